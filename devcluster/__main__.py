"""Starts, ends or shows the development cluster, or adds Kueue to it:
`python -m devcluster up|down|status|kueue`.

Progress goes to stderr. `up` prints `export KUBECONFIG=…` to stdout, for `eval "$(… up)"`.
"""

import argparse
import sys

from devcluster import ClusterError, cluster, kueue, say


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m devcluster", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "status", "kueue"))
    command = parser.parse_args().command
    try:
        if command == "up":
            sys.stdout.write(f"export KUBECONFIG={cluster.up().kubeconfig}\n")
        elif command == "down":
            cluster.down()
        elif command == "kueue":
            kueue.install(cluster.up())
        else:
            sys.stdout.write("\n".join(cluster.status()) + "\n")
    except ClusterError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted: the next up or down cleans up")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
