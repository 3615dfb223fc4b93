"""BFV parameters: sums come out exact as often as was proven, and what a setting cannot bear is refused."""

import struct

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import bfv, coefficients, encryption, packing
from privacy.bfv import DEGREE, Integers, Parameters, Trust
from privacy.refused import Refused

TRUSTS: list[Trust] = ["split", "shared"]


def summed(parameters: Parameters, number: int) -> tuple[Integers, Integers, bytes]:
    """(sum of `number` fresh ciphertexts of one block (2, N), the sum of their slots mod t, the secret key)."""
    public, secret = encryption.keys(parameters)
    encryptor = encryption.Encryptor(parameters, public if parameters.trust == "split" else secret)
    expander = encryption.SeedSum(parameters)
    random = np.random.default_rng(1)
    total, slots = np.zeros((2, DEGREE), np.uint64), np.zeros(DEGREE, object)
    for _ in range(number):
        fresh = random.integers(0, parameters.plain, (1, DEGREE), np.uint64)
        slots = (slots + fresh[0].astype(object)) % parameters.plain
        sent = memoryview(encryptor.encrypt(fresh))
        rest = sent[coefficients.POLYNOMIAL :]
        if parameters.trust == "shared":
            expander.add(bytes(rest))
        else:
            coefficients.add(total[1], coefficients.polynomial(rest, parameters), parameters)
        coefficients.add(total[0], coefficients.polynomial(sent[: coefficients.POLYNOMIAL], parameters), parameters)
    coefficients.add(total[1], expander.take()[0], parameters)
    return total, slots.astype(np.uint64), secret


def residual(total: Integers, slots: Integers, secret: bytes, parameters: Parameters) -> Integers:
    """(N,) what c0 + c1 s differs from q m / t by, centered, computed without SEAL's decryption (float64)."""
    context = encryption._context(parameters)
    key = encryption._loaded(seal.SecretKey, context, secret)
    key_ntt = [key.data().data(i) for i in range(DEGREE)]  # the residues mod q come first
    encoder, plain = seal.BatchEncoder(context), seal.Plaintext()
    encoder.encode(slots.tolist(), plain)
    message = [plain.data(i) if i < plain.coeff_count() else 0 for i in range(DEGREE)]
    q, t = parameters.data_prime, parameters.plain
    scaled = np.array([(2 * q * m + t) // (2 * t) for m in message], object)
    blind = np.random.default_rng(2).integers(0, q, DEGREE, np.uint64)  # a file of SEAL's shows random numbers only
    forward, backward = transforms(parameters)
    ntt = forward(np.stack([total[0], total[1]])).astype(object)
    blinded = forward(np.stack([blind, total[1]]))[0].astype(object)
    mixed = (ntt[0] + ntt[1] * np.array(key_ntt, object) + blinded) % q
    noise = (backward(np.stack([mixed.astype(np.uint64), total[1]]))[0].astype(object) - blind - scaled) % q
    return np.array([float(v if v <= q // 2 else v - q) for v in noise])


def transforms(parameters: Parameters):  # type: ignore[no-untyped-def]
    """(to, from) SEAL's NTT form, of (2, N)."""
    context = encryption._context(parameters)
    form, evaluator = encryption._Form(context), seal.Evaluator(context)

    def through(pair: Integers, ntt: bool) -> Integers:
        prefix = bytearray(form._prefix)
        prefix[32] = ntt
        array = form.part(struct.pack("<Q", 2 * DEGREE) + pair.astype("<u8").tobytes())
        ciphertext = encryption._loaded(seal.Ciphertext, context, form.part(bytes(prefix) + array))
        (evaluator.transform_from_ntt_inplace if ntt else evaluator.transform_to_ntt_inplace)(ciphertext)
        content = encryption._uncompressed(encryption._saved(ciphertext))
        return np.frombuffer(content, "<u8", 2 * DEGREE, len(content) - 16 * DEGREE).reshape(2, DEGREE)

    return lambda pair: through(pair, False), lambda pair: through(pair, True)


@pytest.mark.parametrize("trust", TRUSTS)
def test_measured_noise_stays_below_the_proven_bound_and_is_of_its_kind(trust: Trust) -> None:
    parameters = bfv.fit(trust, 1, 16, 100)
    total, slots, secret = summed(parameters, 100)
    noise = np.abs(residual(total, slots, secret, parameters))
    assert noise.max() < bfv.noise(trust, 100) < parameters.data_prime / (2 * parameters.plain)
    # The bound is 9.5 deviations and what rounding could add at worst; 4096 draws reach 3.5 to 5 deviations.
    deviation = {"split": ((1 + DEGREE * 2 / 3) / 12) ** 0.5, "shared": 10.5**0.5}[trust] * 10
    assert 0.9 < np.sqrt((noise**2).mean()) / deviation < 1.1


@pytest.mark.parametrize("trust", TRUSTS)
def test_as_many_as_a_setting_bears_are_summed_exactly(trust: Trust) -> None:
    bits = {"split": 48, "shared": 50}[trust]
    number = bfv.most_clients(trust, bits)
    parameters = bfv.fit(trust, 1, 16, number)
    assert parameters.plain.bit_length() == bits + 1
    total, slots, secret = summed(parameters, number)
    decryptor = encryption.Decryptor(parameters, secret)
    assert (decryptor.decrypt(total) == slots).all()
    assert decryptor.budget(total) >= 1


@pytest.mark.parametrize(("trust", "bears"), [("split", 6), ("shared", 50)])
def test_much_more_than_a_setting_bears_comes_out_wrong(trust: Trust, bears: int) -> None:
    parameters = bfv.fit(trust, 1, 16, bears)
    total, slots, secret = summed(parameters, 100)
    for _ in range(3):  # each of them eight times: eight times the noise
        slots = ((slots.astype(object) * 2) % parameters.plain).astype(np.uint64)
        for polynomial in total:
            coefficients.add(polynomial, polynomial.copy(), parameters)
    assert (encryption.Decryptor(parameters, secret).decrypt(total) != slots).any()


@given(st.sampled_from(TRUSTS), st.integers(1, 40), st.integers(1, 5000))
@settings(deadline=None)
def test_what_fits_is_wide_enough_secure_enough_and_inside_the_bound(trust: Trust, width: int, clients: int) -> None:
    try:
        parameters = bfv.fit(trust, 1_663_370, width, clients)
    except Refused:
        assert bfv.most_clients(trust, width) < clients
        return
    q, t = parameters.data_prime, parameters.plain
    assert bfv.noise(trust, clients) + 1 <= q / (2 * t)
    assert parameters.fields * width < t.bit_length()
    assert t % (2 * DEGREE) == 1
    assert parameters.security_bits >= 128
    assert parameters.count * parameters.fields * bfv.DATA_SLOTS >= 1_663_370
    assert len(parameters.to_bytes()) < 100
    assert Parameters.from_bytes(parameters.to_bytes()) == parameters


def test_security_counts_the_special_prime() -> None:
    split = bfv.fit("split", 1, 23, 100)
    assert (len(split.primes), split.security_bits) == (2, 192)
    assert seal.CoeffModulus.MaxBitCount(DEGREE, seal.SEC_LEVEL_TYPE.TC192) == 75
    assert (split.primes[0] * split.primes[1]).bit_length() == 75


def test_what_cannot_fit_is_refused_with_the_nearest_that_can() -> None:
    with pytest.raises(
        Refused, match=r"the widest field for 100 clients has 48 bits, the most clients at 49 bits are 26"
    ):
        bfv.fit("split", 1000, 49, 100)
    assert bfv.fit("split", 1000, 48, 100).fields == 1
    assert bfv.fit("split", 1000, 49, 26).fields == 1


@pytest.mark.parametrize("data", [b"", b"UBFV", bytes(18), b"\0" + bfv.fit("split", 9, 23, 9).to_bytes()[1:]])
def test_parameters_that_nobody_made_are_refused(data: bytes) -> None:
    with pytest.raises(Refused, match="one version of Umbel"):
        Parameters.from_bytes(data)


@given(st.integers(1, 51), st.integers(1, 9000), st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_slots_give_back_the_integers(width: int, entries: int, seed: int) -> None:
    parameters = bfv.fit("shared", entries, width, 50)
    integers = np.random.default_rng(seed).integers(0, 2**width, entries, np.uint64)
    slots = bfv.to_slots(integers, parameters)
    assert slots.shape == (parameters.count, DEGREE)
    assert int(slots.max()) < parameters.plain
    assert (slots[:, 0] == 0).all()
    assert (bfv.from_slots(slots, parameters) == integers).all()


def test_an_integer_that_is_too_wide_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 23 bits"):
        bfv.to_slots(np.array([1 << 23], np.uint64), bfv.fit("split", 1, 23, 9))


@pytest.mark.parametrize("trust", TRUSTS)
def test_upload_is_what_was_promised(trust: Trust) -> None:
    def upload(width: int) -> float:
        parameters = bfv.fit(trust, 1_663_370, width, 100)
        return parameters.count * coefficients.size(parameters) / (4 * parameters.entries)

    assert upload(23) < {"split": 1.89, "shared": 0.95}[trust]
    assert upload(16) < {"split": 1.26, "shared": 0.64}[trust]


def test_addition_is_modular_at_its_edges() -> None:
    parameters = bfv.fit("split", 1, 23, 9)
    q = parameters.data_prime
    total = np.array([0, q - 1, q - 1, 1], np.uint64)
    coefficients.add(total, np.array([0, 1, q - 1, q - 1], np.uint64), parameters)
    assert total.tolist() == [0, 0, q - 2, 0]


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_packed_polynomials_come_back_and_are_a_string_of_60_bits_each(seed: int) -> None:
    parameters = bfv.fit("shared", 1, 23, 9)
    one = np.random.default_rng(seed).integers(0, parameters.data_prime, DEGREE, np.uint64)
    data = coefficients.packed(one)
    assert len(data) == packing.size(DEGREE, 60) == coefficients.POLYNOMIAL
    assert (coefficients.polynomial(memoryview(data), parameters) == one).all()


def test_a_coefficient_above_the_prime_is_refused() -> None:
    parameters = bfv.fit("split", 1, 23, 9)
    for place in (0, 14, 15, DEGREE - 1):
        one = np.zeros(DEGREE, np.uint64)
        one[place] = parameters.data_prime
        with pytest.raises(coefficients.Unreadable, match="not below the data prime"):
            coefficients.polynomial(memoryview(coefficients.packed(one)), parameters)
