.PHONY: setup serve test check lock clean

setup:
	@scripts/setup

serve: setup
	@exec .venv/bin/mace serve

test: setup
	@scripts/check
	@.venv/bin/python -m pytest

check: setup
	@scripts/check

lock: setup
	@scripts/lock

clean:
	rm -rf .venv build *.egg-info
