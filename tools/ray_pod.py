"""Train on the nodes of a Ray cluster, one process a node: `python -m tools.ray_pod HOSTS --config FILE key=value ...`.

Ray finds the hosts and starts the processes; these find each other by what this driver tells them. The folder
run.workdir must be one that all nodes see. A hang (5) or a lost process (7) starts all processes again. Needs the
extra `ray`; GPUs or TPUs of a host are claimed by --resources, for instance '{"GPU": 8}'.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

ROOT = Path(__file__).parent.parent
_AGAIN = (5, 7)  # hang, lost process; a negative code is a signal, which is how the runtime ends after a loss


@ray.remote(num_cpus=0, max_restarts=0)
class Host:
    """One node of the cluster."""

    def coordinator(self) -> str:
        """host:port on which process 0 can listen here."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, root: str, arguments: list[str]) -> int:
        """Run the training process to its end and return its code."""
        command = [sys.executable, "-m", "pretrain.main", *arguments]
        return subprocess.run(command, cwd=root, env=dict(os.environ), check=False).returncode


def run_once(num_hosts: int, resources: dict[str, float], arguments: list[str]) -> int:
    """Run one process on each of `num_hosts` nodes; the code of the first that failed, or 0."""
    bundle = {"CPU": 1.0, **resources}
    group = placement_group([bundle] * num_hosts, strategy="STRICT_SPREAD" if num_hosts > 1 else "PACK")
    ray.get(group.ready())
    try:
        hosts = [
            Host.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
                num_cpus=1,
                resources={k: v for k, v in resources.items() if k not in ("CPU", "GPU")},
                num_gpus=resources.get("GPU", 0),
            ).remote()
            for i in range(num_hosts)
        ]
        coordinator = ray.get(hosts[0].coordinator.remote())
        settings = [
            "distributed.cluster=ray",
            f"distributed.coordinator={coordinator}",
            f"distributed.num_processes={num_hosts}",
        ]
        running = [
            host.run.remote(str(ROOT), [*arguments, *settings, f"distributed.process_id={i}"])
            for i, host in enumerate(hosts)
        ]
        codes = ray.get(running)
    finally:
        remove_placement_group(group)
    return next((code for code in codes if code), 0)


def main(argv: list[str]) -> int:
    """Run, start again after a hang or a lost process, return the code of the last attempt."""
    parser = argparse.ArgumentParser(prog="python -m tools.ray_pod", description=__doc__)
    parser.add_argument("hosts", type=int)
    parser.add_argument("--resources", type=json.loads, default={}, help="of one host, as JSON")
    parser.add_argument("--restarts", type=int, default=20)
    options, arguments = parser.parse_known_args(argv)
    ray.init(log_to_driver=True)
    code = run_once(options.hosts, options.resources, arguments)
    for left in range(options.restarts, 0, -1):
        if code not in _AGAIN and code >= 0:
            break
        print(f"a process ended with code {code}; starting all again, {left} restarts left", file=sys.stderr)
        code = run_once(options.hosts, options.resources, arguments)
    ray.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
