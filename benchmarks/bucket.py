"""Gigabytes a second between one process and an S3 store, by the number of blocks in flight.

    python -m benchmarks.bucket [--gigabytes 2] [--threads 1,4,16,32] [--folder /dev/shm]

The store is a versitygw on this machine, with its objects and the file in --folder. Written with
Bucket.put_file, read with Bucket.download; both verify every block. Peer: boto3's upload_file and
download_file, which verify nothing of what they read. Floor: sha256 of all bytes in one thread, which an
upload needs for the object's own hash. CPU seconds a gigabyte are of this process and of the store.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from benchmarks.preprocess import store
from tests.fakes.control_plane import cpu_seconds
from vpmoe.api.storage import StorageSpec
from vpmoe.storage import Bucket, blocks, bucket

BUCKET = "benchmark"


def print_row(name: str, action: Callable[[], object], size: int, server: int) -> None:
    """Time an action that moves `size` bytes, and print its row."""
    mine, its, began = time.process_time(), cpu_seconds(server), time.perf_counter()
    action()
    seconds = time.perf_counter() - began
    of_client, of_server = (
        used / size * 1e9 for used in (time.process_time() - mine, cpu_seconds(server) - its)
    )
    print(
        f"{name:26} {size / seconds / 1e9:6.2f} GB/s   CPU s/GB: {of_client:5.2f}, store {of_server:5.2f}",
        flush=True,
    )


def write_random(path: Path, size: int) -> None:
    """Write a file of `size` bytes, whole blocks of the same random content."""
    block = os.urandom(blocks.BLOCK)
    with path.open("wb") as file:
        for _ in range(size // blocks.BLOCK):
            file.write(block)


def hash_whole(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def measure(folder: Path, size: int, threads: list[int]) -> None:
    """Print the table."""
    path, back = folder / "file", folder / "back"
    write_random(path, size)
    with store(folder) as (endpoint, server, _):
        ours = Bucket.open(
            StorageSpec.model_validate({"endpoint": endpoint, "bucket": BUCKET, "credentialsSecret": None})
        )
        for number in threads:
            bucket.THREADS = number
            stored: list[blocks.Stored] = []
            print_row(
                f"written, {number} blocks",
                lambda stored=stored: stored.append(ours.put_file("ours", path, {})),
                size,
                server,
            )
            print_row(
                f"read, {number} blocks", lambda stored=stored: ours.download(stored[0], back), size, server
            )
        # By default it keeps ten connections, and opens one for each request beyond them.
        client = boto3.client("s3", endpoint_url=endpoint, config=Config(max_pool_connections=max(threads)))
        for number in threads:
            config = TransferConfig(max_concurrency=number, multipart_chunksize=blocks.BLOCK)
            print_row(
                f"boto3 written, {number} threads",
                lambda config=config: client.upload_file(str(path), BUCKET, "peer", Config=config),
                size,
                server,
            )
            print_row(
                f"boto3 read, {number} threads",
                lambda config=config: client.download_file(BUCKET, "peer", str(back), Config=config),
                size,
                server,
            )
        print_row("sha256 in one thread", lambda: hash_whole(path), size, server)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2, help="of the file (default: 2)")
    parser.add_argument("--threads", default="1,4,16,32", help="blocks in flight (default: 1,4,16,32)")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="(default: /dev/shm)")
    given = parser.parse_args()
    size = int(given.gigabytes * 1e9) // blocks.BLOCK * blocks.BLOCK
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        measure(Path(folder), size, [int(number) for number in given.threads.split(",")])


if __name__ == "__main__":
    main()
