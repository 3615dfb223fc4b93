"""BFV through TenSEAL's binding of SEAL, the only door to tenseal: client half, server half and key holder's half.

Guarantee: whoever lacks the secret key learns of an encrypted vector how many ciphertexts it fills and nothing else, as
far as RLWE is hard at `Parameters.security_bits`; SEAL draws every encryption's randomness from the operating system.

SEAL's own reader crashes on crafted bytes, so it is shown none: what travels are numbers (privacy/coefficients.py), and
what SEAL reads is built here around numbers that were checked.

SEAL's binding holds the GIL: each call here is for one ciphertext, about a millisecond, so that other threads run.

Legend: K ciphertexts of N = 4096 coefficients below the data prime q.
"""

import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tenseal.sealapi as seal

from privacy.bfv import DEGREE, Integers, Parameters
from privacy.coefficients import SEED, Unreadable, packed

_HEADER = struct.Struct("<HBBBBHQ")  # magic, size of this, version (2), compression, reserved, bytes in all
_ARRAY = struct.Struct("<Q")
_PREFIX = struct.Struct("<32sBQQQdQ")  # parms_id, NTT form, polynomials, N, primes, scale, correction factor
_RAW, _ZSTD, _BLAKE2XB = 0, 2, b"\1"
_COMPRESSED = "SEAL compressed random numbers: use the version of tenseal in constraints.txt"


# ---- Key holder: keys ----


def keys(parameters: Parameters) -> tuple[bytes, bytes]:
    """(public key, secret key), in SEAL's form. Read again by those alone who have them from the key holder."""
    generator = seal.KeyGenerator(_context(parameters))
    public = seal.PublicKey()
    generator.create_public_key(public)
    return _saved(public), _saved(generator.secret_key())


# ---- Client ----


class Encryptor:
    """The client's half. `key` is the public key in `split`, the secret key in `shared`, signed by the key holder."""

    def __init__(self, parameters: Parameters, key: bytes) -> None:
        context = _context(parameters)
        self._shared = parameters.trust == "shared"
        kind = seal.SecretKey if self._shared else seal.PublicKey
        self._encryptor = seal.Encryptor(context, _loaded(kind, context, key))
        self._encoder = seal.BatchEncoder(context)

    def encrypt(self, slots: Integers) -> bytes:
        """slots (K, N), tags in them -> K ciphertexts of `coefficients.size` bytes."""
        with _Memory() as memory:
            return b"".join([self._one(row, memory) for row in slots])

    def _one(self, slots: Integers, memory: "_Memory") -> bytes:
        plain = seal.Plaintext()
        self._encoder.encode(slots.tolist(), plain)
        content = _uncompressed(memory.save(self._encrypted(plain)))
        start = _PREFIX.size + _HEADER.size + _ARRAY.size
        coefficients = np.frombuffer(content, "<u8", DEGREE * (1 if self._shared else 2), start)
        return b"".join(map(packed, coefficients.reshape(-1, DEGREE))) + (content[-SEED:] if self._shared else b"")

    def _encrypted(self, plain: Any) -> Any:
        if self._shared:
            return self._encryptor.encrypt_symmetric(plain)
        ciphertext = seal.Ciphertext()
        self._encryptor.encrypt(plain, ciphertext)
        return ciphertext


# ---- Server: in a process of its own ----


class SeedSum:
    """The sum of the second polynomials of `shared`, expanded from their seeds by SEAL: for a process that may die."""

    def __init__(self, parameters: Parameters) -> None:
        self._context = _context(parameters)
        self._parameters = parameters
        self._evaluator = seal.Evaluator(self._context)
        form = _Form(self._context)
        filler = np.random.default_rng(0).integers(0, parameters.data_prime, DEGREE, np.uint64)
        first = form.part(_ARRAY.pack(DEGREE) + filler.astype("<u8").tobytes())
        self._template = form.whole(first + form.part(_BLAKE2XB + bytes(SEED)))  # the seed comes last
        self._total: list[Any] = []

    def add(self, seeds: bytes) -> None:
        """seeds: K x `SEED` bytes, any."""
        if len(seeds) != self._parameters.count * SEED:
            raise Unreadable(f"{len(seeds)} bytes of seeds")
        begins = not self._total
        with _Memory() as memory:
            memory.write(self._template)
            for k in range(self._parameters.count):
                memory.write(seeds[k * SEED : (k + 1) * SEED], len(self._template) - SEED)
                ciphertext = seal.Ciphertext()
                ciphertext.load(self._context, memory.path)
                if begins:
                    self._total.append(ciphertext)
                else:
                    self._evaluator.add_inplace(self._total[k], ciphertext)

    def take(self) -> Integers:
        """(K, N), and begin again at 0."""
        sums = np.zeros((self._parameters.count, DEGREE), np.uint64)
        for row, total in zip(sums, self._total, strict=False):
            content = _uncompressed(_saved(total))
            row[:] = np.frombuffer(content, "<u8", DEGREE, len(content) - 8 * DEGREE)
        self._total = []
        return sums


# ---- Key holder: opening ----


class Decryptor:
    """Whoever holds the secret key. What it returns is for the key holder's checks alone, never for the server."""

    def __init__(self, parameters: Parameters, secret: bytes) -> None:
        self._context = context = _context(parameters)
        self._form = _Form(context)
        self._prime = parameters.data_prime
        self._decryptor = seal.Decryptor(context, _loaded(seal.SecretKey, context, secret))
        self._encoder = seal.BatchEncoder(context)

    def decrypt(self, polynomials: Integers) -> Integers:
        """polynomials (2, N), each coefficient below q -> slots (N,)."""
        plain = seal.Plaintext()
        self._decryptor.decrypt(self._read(polynomials), plain)
        return np.array(self._encoder.decode_uint64(plain), np.uint64)

    def budget(self, polynomials: Integers) -> int:
        """Bits of noise budget that SEAL sees, for tests of the bound that is proven in privacy/bfv.py."""
        return int(self._decryptor.invariant_noise_budget(self._read(polynomials)))

    def _read(self, polynomials: Integers) -> Any:
        if polynomials.shape != (2, DEGREE) or int(polynomials.max()) >= self._prime:
            raise Unreadable("these are not two polynomials below the data prime")
        array = self._form.part(_ARRAY.pack(2 * DEGREE) + polynomials.astype("<u8", copy=False).tobytes())
        return _loaded(seal.Ciphertext, self._context, self._form.whole(array))


# ---- SEAL's own form ----


def _context(parameters: Parameters) -> Any:
    """No context holds a key. The security level is checked by SEAL, the special prime counted."""
    made = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    made.set_poly_modulus_degree(DEGREE)
    made.set_coeff_modulus([seal.Modulus(prime) for prime in parameters.primes])
    made.set_plain_modulus(seal.Modulus(parameters.plain))
    context = seal.SEALContext(made, True, getattr(seal.SEC_LEVEL_TYPE, f"TC{parameters.security_bits}"))
    if not context.parameters_set():
        raise RuntimeError(f"{parameters}: {context.parameters_error_message()}")
    return context


class _Form:
    """Builds what SEAL reads, uncompressed and complete, around numbers that were checked."""

    def __init__(self, context: Any) -> None:
        self._version = _HEADER.unpack_from(_saved(context.key_context_data().parms()))[:4]
        identity = struct.pack("<4Q", *context.first_parms_id())
        self._prefix = _PREFIX.pack(identity, 0, 2, DEGREE, 1, 1.0, 1)

    def part(self, content: bytes) -> bytes:
        return _HEADER.pack(*self._version, _RAW, 0, _HEADER.size + len(content)) + content

    def whole(self, parts: bytes) -> bytes:
        """A ciphertext of two polynomials, of the parts that follow its fixed one."""
        return self.part(self._prefix + parts)


def _uncompressed(data: bytes) -> bytes:
    """What is in SEAL's header, out of a zstd frame whose blocks are raw. Raises RuntimeError where one of them is not.

    SEAL offers everything to zstd, which leaves a block as it is unless that saves 1.56 %. Of a ciphertext's numbers
    the upper four bits of 64 are 0, which saves 1.20 % with a deviation of 0.02.
    """
    compression = _HEADER.unpack_from(data)[4]
    if compression == _RAW:
        return data[_HEADER.size :]
    if compression != _ZSTD:
        raise RuntimeError(_COMPRESSED)
    descriptor = data[_HEADER.size + 4]
    single = descriptor >> 5 & 1
    at = _HEADER.size + 5 + (1 - single) + (single, 2, 4, 8)[descriptor >> 6]
    blocks, last = [], 0
    while not last:
        block = int.from_bytes(data[at : at + 3], "little")
        last, kind, length = block & 1, block >> 1 & 3, block >> 3
        if kind:
            raise RuntimeError(_COMPRESSED)
        blocks.append(data[at + 3 : at + 3 + length])
        at += 3 + length
    return b"".join(blocks)


def _saved(value: Any) -> bytes:
    with _Memory() as memory:
        return memory.save(value)


def _loaded(kind: Callable[[], Any], context: Any, data: bytes) -> Any:
    value = kind()
    with _Memory() as memory:
        memory.write(data)
        value.load(context, memory.path)
    return value


class _Memory:
    """A file for SEAL, which reads and writes nothing else: in memory where the system can, else for us alone."""

    def __enter__(self) -> "_Memory":
        if hasattr(os, "memfd_create"):
            self._file, self._named = os.memfd_create("seal"), ""
            self.path = f"/proc/self/fd/{self._file}"
        else:
            self._file, self._named = tempfile.mkstemp()
            self.path = self._named
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        if self._named:
            Path(self._named).unlink()

    def write(self, data: bytes, at: int = 0) -> None:
        os.pwrite(self._file, data, at)

    def save(self, value: Any) -> bytes:
        value.save(self.path)
        return os.pread(self._file, os.fstat(self._file).st_size, 0)
