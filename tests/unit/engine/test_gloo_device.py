"""Process groups of one rank share the thread that looks after their device."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
GROUPS = """
from datetime import timedelta
from pathlib import Path
import torch
from torch import distributed
from engine.vllm.compat import share_gloo_device

share_gloo_device()
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
groups = [distributed.new_group([0], backend="gloo", timeout=timedelta(seconds=9)) for _ in range(6)]
numbers = torch.ones(3)
for group in groups:
    distributed.all_reduce(numbers, group=group)
    distributed.barrier(group=group)
assert numbers.tolist() == [1, 1, 1]
print([path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")].count("gloo_tcp_loop"))
"""


def test_groups_of_one_rank_share_a_thread():
    done = subprocess.run([sys.executable, "-c", GROUPS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr
