"""One battery for every codec: round trip, length, seeds, hostile bytes; then what each alone promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clients import codecs
from clients.codecs import CodecError
from privacy.refused import Refused

# name -> (length in bytes for P entries, largest error of one entry for an update x without residual)
CODECS = {
    "float32": (lambda size: 4 * size, lambda x: np.zeros(len(x))),
    "float16": (lambda size: 2 * size, lambda x: np.maximum(np.abs(x) * 2.0**-11, 2.0**-25)),
    "qsgd8": (lambda size: size + 4 * -(-size // 512), lambda x: block_scales(x) * (1 + 1e-6)),
    "topk:0.1": (lambda size: 8 * -(-size // 10), lambda x: np.where(np.abs(x) > smallest_kept(x, 0.1), 0, np.abs(x))),
    "topk:1": (lambda size: 8 * size, lambda x: np.zeros(len(x))),
}
battery = pytest.mark.parametrize("name", CODECS)


def block_scales(x):
    """The scale of each entry's block of 512 in qsgd8: the largest magnitude / 127."""
    blocks = [x[k : k + 512] for k in range(0, len(x), 512)]
    return np.concatenate([np.full(len(b), np.nextafter(np.abs(b).max() / np.float32(127), np.inf)) for b in blocks])


def smallest_kept(x, share):
    return np.sort(np.abs(x))[-int(np.ceil(share * len(x)))]


def vector(size, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_t(3, size)).astype(np.float32)


def there_and_back(name, update, residual=None, seed=0):
    codec = codecs.resolve(name)
    payload, residual = codec.encode(update, residual, seed)
    return codec.decode(payload, len(update)), residual


finite = st.floats(-1e4, 1e4, width=32)
updates = st.integers(1, 1100).flatmap(lambda size: arrays(np.float32, size, elements=finite, fill=finite))


def test_the_battery_holds_every_codec():
    assert {name.partition(":")[0] for name in CODECS} == set(codecs.CODECS)


# ---- the battery ----


@battery
@settings(max_examples=60, deadline=None)
@given(update=updates, seed=st.integers(0, 2**63 - 1))
def test_round_trip_stays_within_the_codecs_error(name, update, seed):
    decoded, _ = there_and_back(name, update, seed=seed)
    assert decoded.dtype == np.float32
    assert decoded.shape == update.shape
    error = np.abs(decoded.astype(np.float64) - update)
    assert (error <= CODECS[name][1](update)).all()


@battery
@pytest.mark.parametrize("size", [1, 2, 9, 10, 11, 511, 512, 513, 1024, 5000])
def test_length_is_what_the_formula_says(name, size):
    codec = codecs.resolve(name)
    payload, _ = codec.encode(vector(size), None, 0)
    assert type(payload) is bytes
    assert len(payload) == codec.bytes(size) == CODECS[name][0](size)


@battery
def test_equal_arguments_give_equal_bytes_and_inputs_stay_as_they_are(name):
    update, residual = vector(3000), vector(3000, seed=1)
    before = update.copy(), residual.copy()
    first, second = (codecs.resolve(name).encode(update, residual, 7) for _ in range(2))
    assert first[0] == second[0]
    assert (update == before[0]).all()
    assert (residual == before[1]).all()


@battery
def test_what_is_decoded_is_new_and_writable(name):
    decoded, _ = there_and_back(name, vector(100))
    decoded[0] = 5  # frombuffer alone would give a read-only view of the message


@battery
def test_decoded_plus_residual_is_the_sum_of_all_updates(name):
    codec, size = codecs.resolve(name), 700
    residual, sent, given_ = None, np.zeros(size), np.zeros(size)
    for k in range(12):
        update = vector(size, seed=k)
        payload, residual = codec.encode(update, residual, k)
        sent += codec.decode(payload, size)
        given_ += update
    if residual is None:  # no feedback: the errors of the rounds add up
        bound = sum(CODECS[name][1](vector(size, seed=k)) for k in range(12))
        assert (np.abs(sent - given_) <= bound + 1e-4).all()
    else:
        np.testing.assert_allclose(sent + residual, given_, atol=1e-4)


@battery
def test_a_residual_is_sent_by_every_codec(name):
    update, residual = np.zeros(50, np.float32), np.zeros(50, np.float32)
    residual[3] = 2.0
    decoded, left = there_and_back(name, update, residual)
    total = decoded + (0 if left is None else left)
    np.testing.assert_allclose(total, residual, rtol=1e-3)


@battery
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_not_encoded(name, bad):
    update = vector(40)
    update[7] = bad
    with pytest.raises(CodecError, match="must be finite: 1 of 40"):
        codecs.resolve(name).encode(update, None, 0)


@battery
def test_a_residual_that_overflows_the_update_is_not_encoded(name):
    huge = np.full(4, 3e38, np.float32)
    with pytest.raises(CodecError, match="finite"):
        codecs.resolve(name).encode(huge, huge, 0)


@battery
@pytest.mark.parametrize(
    ("update", "residual"),
    [
        (np.zeros(4), None),
        (np.zeros((2, 2), np.float32), None),
        (np.zeros(4, np.float32), np.zeros(1, np.float32)),
        (np.zeros(4, np.float32), np.zeros(4)),
    ],
    ids=["float64", "matrix", "short residual", "float64 residual"],
)
def test_another_dtype_or_shape_is_not_encoded(name, update, residual):
    with pytest.raises(CodecError, match="float32"):
        codecs.resolve(name).encode(update, residual, 0)


@battery
@pytest.mark.parametrize("change", [-8, -1, 1, 8])
def test_a_payload_of_another_length_is_refused_with_both_lengths(name, change):
    codec = codecs.resolve(name)
    right = codec.bytes(100)
    with pytest.raises(CodecError, match=rf"takes {right} bytes, {right + change} came"):
        codec.decode(bytes(right + change), 100)


@battery
def test_a_payload_for_another_model_is_refused(name):
    codec = codecs.resolve(name)
    payload, _ = codec.encode(vector(100), None, 0)
    with pytest.raises(CodecError):
        codec.decode(payload, 120)


def decodes_or_refuses(codec, payload, size):
    try:
        update = codec.decode(payload, size)
    except CodecError:
        return
    assert update.dtype == np.float32
    assert update.shape == (size,)
    assert np.isfinite(update).all()


@battery
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_mutation_of_a_payload_decodes_to_a_finite_update_or_is_refused(name, data):
    size = data.draw(st.sampled_from([1, 20, 513]))
    codec = codecs.resolve(name)
    payload = bytearray(codec.encode(vector(size, seed=size), None, 0)[0])
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(payload)))
        match data.draw(st.sampled_from(["overwrite", "insert", "delete"])):
            case "overwrite":
                new = data.draw(st.binary(min_size=1, max_size=8))[: len(payload) - start]
                payload[start : start + len(new)] = new
            case "insert":
                payload[start:start] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del payload[start : start + data.draw(st.integers(1, 8))]
    decodes_or_refuses(codec, bytes(payload), size)


@battery
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bytes_of_the_right_length_decode_to_a_finite_update_or_are_refused(name, data):
    codec, size = codecs.resolve(name), data.draw(st.integers(1, 30))
    decodes_or_refuses(codec, data.draw(st.binary(min_size=codec.bytes(size), max_size=codec.bytes(size))), size)


# ---- float32, float16 ----


@pytest.mark.parametrize(("name", "dtype"), [("float32", "<f4"), ("float16", "<f2")])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_dense_payloads_with_numbers_that_are_none_are_refused(name, dtype, bad):
    with pytest.raises(CodecError, match="must be finite: 1 of 3"):
        codecs.resolve(name).decode(np.array([0, bad, 1], dtype).tobytes(), 3)


def test_float32_is_lossless_to_the_bit():
    update = vector(1000, scale=1e-30)
    assert there_and_back("float32", update)[0].tobytes() == update.tobytes()


def test_float16_refuses_what_would_overflow_and_names_the_way_out():
    largest = np.array([65504.0, -65504.0], np.float32)
    assert (there_and_back("float16", largest)[0] == largest).all()
    with pytest.raises(CodecError, match=r"70000 is beyond float16 \(65504\): use codec=float32"):
        there_and_back("float16", np.array([1.0, -70000.0], np.float32))


# ---- top-k ----


def test_topk_sends_the_largest_magnitudes_and_keeps_the_rest():
    update = np.float32([0.1, -5, 0, 3, -0.2, 4, 0.3, 0, 0, 1])
    decoded, residual = there_and_back("topk:0.3", update)
    np.testing.assert_array_equal(decoded, np.float32([0, -5, 0, 3, 0, 4, 0, 0, 0, 0]))
    np.testing.assert_array_equal(residual, update - decoded)


def test_topk_sends_the_lower_index_of_equals():
    decoded, _ = there_and_back("topk:0.5", np.float32([1, -1, 2, 1, 1, -1]))
    np.testing.assert_array_equal(decoded, [1, -1, 2, 0, 0, 0])


def test_topk_feedback_is_exact_in_every_round():
    residual = None
    for k in range(5):
        update = vector(400, seed=k)
        whole = update if residual is None else update + residual
        decoded, residual = there_and_back("topk:0.05", update, residual)
        assert (decoded + residual == whole).all()
        assert not ((decoded != 0) & (residual != 0)).any()


def test_topk_feedback_sends_in_time_what_is_never_among_the_largest():
    update = np.float32([1, 1, 1, 0.3])
    residual, sent = None, np.zeros(4)
    for _ in range(100):
        decoded, residual = there_and_back("topk:0.25", update, residual)
        sent += decoded
    assert sent[3] > 20  # without feedback: 0
    assert np.abs(residual).max() < 5


@pytest.mark.parametrize(
    "indices", [[5, 5], [5, 4], [3, 20], [0, 2**32 - 1], [2**31, 3]], ids=["twice", "back", "P", "last", "wraps"]
)
def test_topk_indices_that_do_not_increase_or_lie_outside_are_refused(indices):
    payload = np.array(indices, "<u4").tobytes() + np.ones(2, "<f4").tobytes()
    with pytest.raises(CodecError, match="must increase and lie below 20"):
        codecs.resolve("topk:0.1").decode(payload, 20)


def test_topk_values_that_are_not_finite_are_refused():
    payload = np.array([0, 1], "<u4").tobytes() + np.array([1, np.nan], "<f4").tobytes()
    with pytest.raises(CodecError, match="finite"):
        codecs.resolve("topk:0.1").decode(payload, 20)


# ---- qsgd8 ----


def sample_mean_error(codec, update, count=2000):
    """(mean over seeds of decoded - update) in its standard errors; the second: its exact standard deviation."""
    total = np.zeros(len(update))
    for seed in range(count):
        total += codec.decode(codec.encode(update, None, seed)[0], len(update))
    scale = np.abs(update).max() / 127
    part = np.abs(update.astype(np.float64)) / scale % 1
    deviation = scale * np.sqrt(part * (1 - part) / count)
    return (total / count - update) / np.maximum(deviation, scale * 1e-3)


def test_qsgd8_is_unbiased_and_the_test_would_see_a_bias():
    update = vector(200, seed=3)
    assert np.abs(sample_mean_error(codecs.qsgd8(), update)).max() < 5

    def to_nearest(vector_, seed):
        scale = np.float32(np.abs(vector_).max() / 127)
        return scale.astype("<f4").tobytes() + np.round(vector_ / scale).astype(np.int8).tobytes()

    biased = codecs.Codec("nearest", codecs.qsgd8().bytes, to_nearest, codecs.qsgd8().unpack)
    assert np.abs(sample_mean_error(biased, update, 200)).max() > 5


def test_qsgd8_rounds_by_the_seed():
    codec, update = codecs.qsgd8(), vector(2000)
    one, again, other = (codec.encode(update, None, seed)[0] for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert one[:16] == other[:16]  # the scales of 4 blocks do not depend on it


def test_qsgd8_keeps_zeros_and_the_largest_entry_of_each_block():
    update = np.zeros(1536, np.float32)
    update[5], update[600] = -3.3, 1e-20
    for seed in range(20):
        decoded, _ = there_and_back("qsgd8", update, seed=seed)
        np.testing.assert_allclose(decoded[[5, 600]], update[[5, 600]], rtol=1e-6)
        assert np.count_nonzero(decoded) == 2


def test_qsgd8_scales_are_never_rounded_down_which_would_cut_the_largest_entry():
    for seed in range(30):
        update = vector(512, seed=seed)
        (scale,) = np.frombuffer(codecs.qsgd8().encode(update, None, 0)[0], "<f4", 1).astype(np.float64)
        largest = np.abs(update).max().astype(np.float64)
        assert largest * (1 - 1e-15) <= scale * 127 <= largest * (1 + 2e-7)


def test_qsgd8_keeps_the_largest_entry_at_the_last_draw_below_one(monkeypatch):
    class Last:
        def random(self, size):
            return np.full(size, np.nextafter(1, 0))

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Last())
    update = np.full(3, 127.0, np.float32)
    assert (there_and_back("qsgd8", update)[0] == update).all()


def test_qsgd8_gives_each_block_its_own_scale():
    update = np.concatenate([vector(512, scale=1e3), vector(512, seed=1, scale=1e-3)])
    decoded, _ = there_and_back("qsgd8", update)
    small = slice(512, None)
    assert np.abs(decoded[small] - update[small]).max() < np.abs(update[small]).max() / 100


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-38])
def test_qsgd8_survives_the_smallest_numbers(tiny):
    update = np.full(3, tiny, np.float32)
    assert np.abs(there_and_back("qsgd8", update)[0] - update).max() <= max(1e-45, tiny / 100)


def test_qsgd8_refuses_what_its_scale_cannot_carry_and_names_the_way_out():
    with pytest.raises(CodecError, match="use codec=float32"):
        there_and_back("qsgd8", np.full(3, np.finfo(np.float32).max))


@pytest.mark.parametrize(("scale", "level"), [(np.nan, 1), (np.inf, 0), (-1.0, 1), (1.0, -128), (3e38, 100)], ids=str)
def test_qsgd8_scales_and_levels_that_no_encoder_makes_are_refused(scale, level):
    payload = np.array([scale], "<f4").tobytes() + np.array([level, 0], np.int8).tobytes()
    with pytest.raises(CodecError, match=r"qsgd8 payload must"):
        codecs.qsgd8().decode(payload, 2)


# ---- names ----


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("float64", "choose float32, float16, topk:SHARE"),
        ("", "choose float32"),
        ("float32:2", "codec=float32"),
        ("qsgd8:", "codec=qsgd8"),
        ("topk", "topk:0.05"),
        ("topk:", "topk:0.05"),
        ("topk:five", "topk:0.05"),
        ("topk:0", "above 0"),
        ("topk:1.5", "at most 1"),
        ("topk:-0.1", "above 0"),
        ("topk:nan", "above 0"),
    ],
)
def test_a_codec_that_does_not_exist_is_refused_in_one_line_with_the_way_out(name, hint):
    with pytest.raises(Refused, match=hint) as caught:
        codecs.resolve(name)
    assert "\n" not in str(caught.value)
