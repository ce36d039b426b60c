.PHONY: setup serve unit test test-all check docs lock clean

setup:
	@scripts/setup

serve: setup
	@exec .venv/bin/mace serve

unit: setup
	@scripts/test unit

test: setup
	@scripts/test most

test-all: setup
	@scripts/test all

check: setup
	@scripts/check

docs: setup
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --site-dir build/site && echo "docs: build/site/index.html"

lock: setup
	@scripts/lock

clean:
	rm -rf .venv build *.egg-info
