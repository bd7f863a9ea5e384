"""Random numbers that are the bytes of a fuzzer's input, so that it steers what they decide."""

from random import Random


class ByteRandom(Random):
    """Zeros once the bytes have run out."""

    def __init__(self, data: bytes):
        super().__init__(0)
        self.data, self.at = data, 0

    def getrandbits(self, k: int, /) -> int:
        count = (k + 7) // 8
        piece = self.data[self.at : self.at + count]
        self.at += count
        return int.from_bytes(piece, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53
