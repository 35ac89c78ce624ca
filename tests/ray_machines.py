"""A local cluster of Ray as a program: a head and more nodes, one CPU each, in processes of their own.

Reads ``add`` and ``kill NUMBER`` from its standard input, a line each, and answers each with a line of ``told`` and JSON: other
lines are Ray's.  It ends, and the
cluster with it, when its standard input does.  In a process of its own because Ray's client, in one that had run a
thousand other tests, has crashed in protobuf's C code and taken the worker of pytest along.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster, nodes = Cluster(), []
    try:
        for line in sys.stdin:
            match line.split():
                case ["add"]:
                    nodes.append(
                        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
                    )
                    raylet = nodes[-1].all_processes["raylet"][0].process.pid
                    told = {"number": len(nodes) - 1, "raylet": raylet, "address": cluster.address}
                case ["kill", number]:
                    # All processes of a node, as a power cut would.
                    cluster.remove_node(nodes[int(number)], allow_graceful=False)
                    told = {}
                case _:
                    raise ValueError(f"unknown command {line!r}")
            print(f"told {json.dumps(told)}", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
