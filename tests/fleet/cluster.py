"""A Ray cluster of this machine: prints its address, and ends with its standard input."""

import sys

import ray

ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
