"""`python wire.py A B DELAY LOSS RATE`: a long, lossy and slow cable between two network cards.

Every frame that arrives at one leaves the other DELAY seconds later, but for the share LOSS of them, and at most RATE
bytes a second in each direction (netem would do the same, where a kernel has it).
"""

from __future__ import annotations

import heapq
import random
import select
import socket
import sys
import time

EVERY_PROTOCOL = 3
OUTGOING = 4  # a packet socket also hears what its own machine sends


def main() -> None:
    delay, loss, rate = map(float, sys.argv[3:])
    ends = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL)) for _ in range(2)]
    for end, card in zip(ends, sys.argv[1:3], strict=True):
        end.bind((card, 0))
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    free = dict.fromkeys(ends, 0.0)  # when each can take the next frame
    draw, under_way, number = random.Random(0), [], 0
    while True:
        wait = under_way[0][0] - time.monotonic() if under_way else None
        for end in select.select(ends, [], [], max(wait, 0) if wait is not None else None)[0]:
            frame, origin = end.recvfrom(65536)
            if origin[2] != OUTGOING and draw.random() >= loss:
                number += 1
                free[end] = max(free[end], time.monotonic()) + len(frame) / rate
                heapq.heappush(under_way, (free[end] + delay, number, frame, other[end]))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, frame, end = heapq.heappop(under_way)
            end.send(frame)


if __name__ == "__main__":
    main()
