"""A Ray cluster of two CPUs and two GPUs in name: prints its address; ends with its input."""

import sys

import ray

ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
