"""What a server makes of ciphertexts and what is published: under CKKS the secret key, here nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
from sympy import ZZ
from sympy.polys.matrices import DomainMatrix

from privacy import coefficients, encryption
from privacy.bfv import DEGREE, Integers, Parameters
from privacy.encrypted_sum import seal as seal_sum
from privacy.refused import Refused

Gather = Callable[..., Any]


def recovered(chunks: list[tuple[Integers, Integers, Integers]], prime: int) -> Integers:
    """The key s (N,) in NTT form, from two chunks (c0, c1, twice the real part of what was decrypted), in NTT form.

    Li and Micciancio 2021, section 3.1, where real parts alone are published: conjugation turns an NTT form round, so
    c1 s + conj(c1) conj(s) = published - c0 - conj(c0), two equations in two unknowns at each point.
    """
    (a, b, right), (c, d, other) = (
        (c1.astype(object), c1[::-1].astype(object), shown.astype(object) - c0 - c0[::-1].astype(object))
        for c0, c1, shown in chunks
    )
    inverse = np.array([pow(int(value), -1, prime) for value in (a * d - b * c) % prime], object)
    return ((right * d - other * b) * inverse % prime).astype(np.uint64)


def read(value: Any, polynomials: int) -> Integers:
    """(polynomials, N), the numbers at the end of what SEAL saves."""
    content = encryption._uncompressed(encryption._saved(value))
    count = polynomials * DEGREE
    return np.frombuffer(content, "<u8", count, len(content) - 8 * count).reshape(polynomials, DEGREE)


def test_published_means_under_ckks_give_the_server_the_secret_key() -> None:
    made = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    made.set_poly_modulus_degree(DEGREE)
    made.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, [60]))
    context = seal.SEALContext(made, True, seal.SEC_LEVEL_TYPE.TC128)
    secret = seal.KeyGenerator(context).secret_key()
    encoder, scale, clients = seal.CKKSEncoder(context), 2.0**30, 5

    def summed(seed: int) -> tuple[Any, Any]:
        """(the server's sum of one chunk, the mean that the clients hand back)."""
        encryptor, random, total = seal.Encryptor(context, secret), np.random.default_rng(seed), seal.Ciphertext()
        for i in range(clients):
            plain, one = seal.Plaintext(), seal.Ciphertext()
            encoder.encode(random.uniform(-1, 1, DEGREE // 2).tolist(), scale, plain)
            encryptor.encrypt_symmetric(plain, one if i else total)
            if i:
                seal.Evaluator(context).add_inplace(total, one)
        opened = seal.Plaintext()
        seal.Decryptor(context, secret).decrypt(total, opened)
        return total, np.array(encoder.decode_double(opened)) / clients

    chunks = []
    for seed in (1, 2):
        total, mean = summed(seed)
        again = seal.Plaintext()
        encoder.encode((mean * clients * 2).tolist(), scale, again)
        chunks.append((*read(total, 2), np.array([again.data(i) for i in range(DEGREE)], np.uint64)))
    assert (recovered(chunks, made.coeff_modulus()[0].value()) == read(secret, 1)[0]).all()


def to_ntt(polynomials: Integers, parameters: Parameters) -> Integers:
    """(2, N) -> its NTT form."""
    context = encryption._context(parameters)
    form = encryption._Form(context)
    array = encryption._ARRAY.pack(2 * DEGREE) + polynomials.astype("<u8").tobytes()
    ciphertext = encryption._loaded(seal.Ciphertext, context, form.whole(form.part(array)))
    seal.Evaluator(context).transform_to_ntt_inplace(ciphertext)
    return read(ciphertext, 2)


def test_published_sums_here_give_the_server_nothing_of_the_secret_key(gather: Gather) -> None:
    cohort = gather("shared", entries=9000)
    server = cohort.sum()
    for name, update in cohort.updates().items():
        server.add(name, update)
    total = server.polynomials()
    cohort.holder.open(cohort.run, 1, server.roster, server.seal(cohort.deal.link_key))
    parameters, secret = cohort.parameters, cohort.keys["silo-0"].key
    context, q, t = encryption._context(parameters), parameters.data_prime, parameters.plain
    key = read(encryption._loaded(seal.SecretKey, context, secret), 1)[0]
    decryptor, without, with_noise = encryption.Decryptor(parameters, secret), [], []
    for pair in total:
        plain = seal.Plaintext()  # more than is published: the tag's slot too
        seal.BatchEncoder(context).encode(decryptor.decrypt(pair).tolist(), plain)
        message = np.array([plain.data(i) if i < plain.coeff_count() else 0 for i in range(DEGREE)], object)
        scaled = ((2 * q * message + t) // (2 * t) % q).astype(np.uint64)
        c0, c1 = to_ntt(pair, parameters)
        shown = to_ntt(np.stack([scaled, pair[1]]), parameters)[0]
        exact = ((c0.astype(object) + c1.astype(object) * key.astype(object)) % q).astype(np.uint64)
        for chunks, message in ((without, shown), (with_noise, exact)):
            chunks.append((c0, c1, ((message.astype(object) + message[::-1]) % q).astype(np.uint64)))
    guess = recovered(without, q)
    assert (guess != key).all()
    assert abs(np.mean(guess / q) - 0.5) < 0.05  # a random element
    # Given the noise, which exact sums do not show and CKKS does, the same attack has the key: it is well aimed.
    assert (recovered(with_noise, q) == key).all()


def multiplier(keep: int, lose: int, plain: int, length: int = 24) -> list[int]:
    """A short polynomial that is 1 at `keep` and 0 at `lose` mod plain, by LLL and rounding."""

    def line(at_keep: int, at_lose: int) -> tuple[int, int]:
        slope = (at_keep - at_lose) * pow(keep - lose, -1, plain) % plain
        return (at_keep - slope * keep) % plain, slope

    rows = [[plain, 0, *[0] * (length - 2)], [0, plain, *[0] * (length - 2)]]
    for i in range(2, length):
        constant, slope = line(pow(keep, i, plain), pow(lose, i, plain))
        rows.append([-constant, -slope, *[int(i == j) for j in range(2, length)]])
    basis = DomainMatrix(rows, (length, length), ZZ).lll().to_Matrix().tolist()
    exact = np.array([[int(value) for value in row] for row in basis], object)
    point = np.array([*line(1, 0), *[0] * (length - 2)], object)
    for _ in range(4):  # float64 gives some digits at a time
        steps = np.rint(np.linalg.solve(exact.astype(np.float64).T, point.astype(np.float64)))
        point = point - np.array([int(step) for step in steps], object) @ exact
    return [int(value) for value in point]


def times(polynomial: Integers, factor: list[int], prime: int) -> Integers:
    """polynomial (N,) x factor in Z[X] / (X^N + 1) mod prime."""
    total = np.zeros(DEGREE, object)
    for shift, value in enumerate(factor):
        moved = np.roll(polynomial.astype(object), shift)
        moved[:shift] *= -1
        total += value * moved
    return (total % prime).astype(np.uint64)


def test_a_slot_of_one_client_cut_out_of_the_sum_passes_bare_pads_and_is_refused(gather: Gather) -> None:
    """A server multiplies all updates but one by a short polynomial that is 1 in the tag's slot and 0 in another."""
    cohort = gather("shared", clients=4000)
    parameters, updates = cohort.parameters, cohort.updates()
    parts = {}
    for name, update in updates.items():
        server = cohort.sum()
        server.add(name, update)
        parts[name] = server.polynomials()[0]
    decryptor = encryption.Decryptor(parameters, cohort.keys["silo-0"].key)
    slots = {name: decryptor.decrypt(part) for name, part in parts.items()}
    roots = seal.Plaintext("1x^1")
    points = seal.BatchEncoder(encryption._context(parameters)).decode_uint64(roots)
    factor = multiplier(points[0], points[1], parameters.plain)
    assert max(map(abs, factor)) < 100

    total = parts["silo-0"].copy()
    for name in ("silo-1", "silo-2", "silo-3", "silo-4"):
        for i in range(2):
            coefficients.add(total[i], times(parts[name][i], factor, parameters.data_prime), parameters)
    shown = decryptor.decrypt(total)
    assert shown[1] == slots["silo-0"][1]  # one client's integers, out of a sum over five
    assert int(shown[0]) == sum(int(each[0]) for each in slots.values()) % parameters.plain  # and its tag is right

    roster = tuple(parts)
    deal = cohort.deal
    data = seal_sum(total[None], parameters, deal.key_id, cohort.run, 1, roster, deal.link_key)
    with pytest.raises(Refused, match="not the sum of its roster"):
        cohort.holder.open(cohort.run, 1, roster, data)
