"""Sound and video: mel features as the published extractor makes them, frames as the published sampler picks them."""

import io

import av
import numpy as np
import pytest
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import Gemma4UnifiedAudioFeatureExtractor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from cabochon.errors import MediaError
from cabochon.media import audio, image, video
from support.media_files import movie, wav


def tone(count: int) -> np.ndarray:
    return (0.1 * np.sin(2 * np.pi * 440 * np.arange(count) / 16_000)).astype(np.float32)


@pytest.mark.parametrize("count", [161, 640, 1000, 8000, 16_001, 44_100, 80_000, 480_000])
def test_log_mel_equals_reference(count):
    wave = (np.random.default_rng(count).standard_normal(count) * 0.1).astype(np.float32)
    theirs = Gemma4AudioFeatureExtractor()([wave], return_tensors="np")
    mask = theirs["input_features_mask"][0]
    ours = audio.log_mel(wave)
    np.testing.assert_allclose(ours, theirs["input_features"][0][mask], atol=1e-4)
    assert len(ours) == audio.mel_frames(count) == mask.sum()
    assert audio.soft_tokens(count, tower=True) == mask[::2][::2].sum()


@pytest.mark.parametrize(("count", "total"), [(16_000, -72048.109), (80_000, -364873.875)])
def test_log_mel_has_the_published_checksums(count, total):
    assert audio.log_mel(tone(count)).sum(dtype=np.float64) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("count", [1, 639, 640, 641, 16_001])
def test_raw_frames_equal_reference(count):
    wave = np.random.default_rng(1).standard_normal(count).astype(np.float32)
    theirs = Gemma4UnifiedAudioFeatureExtractor()([wave], return_tensors="np")["input_features"][0]
    np.testing.assert_array_equal(audio.raw_frames(wave), theirs)
    assert audio.soft_tokens(count, tower=False) == len(theirs)


def test_pcm_is_read_to_the_bit():
    wave = tone(5000)
    got = audio.read_audio(wav(wave), 30)
    np.testing.assert_array_equal(got, np.round(wave * 32767).astype(np.int16) / np.float32(32768))


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_rates_and_channels_come_down_to_16_khz_mono(rate, channels):
    wave = (0.1 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32)
    got = audio.read_audio(wav(wave, rate=rate, channels=channels), 30)
    assert abs(len(got) - 16_000) <= 32
    middle = got[4000:12_000]
    assert np.abs(middle).max() == pytest.approx(0.1, rel=0.02)
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() * 2 == pytest.approx(440, abs=4)


def test_long_sound_is_refused_or_split():
    wave = tone(16_000 * 70)
    with pytest.raises(MediaError, match="longer than 30 seconds"):
        audio.read_audio(wav(wave), 30)
    parts = audio.windows(audio.read_audio(wav(wave), 100))
    assert [len(p) for p in parts] == [480_000, 480_000, 16_000 * 12]
    np.testing.assert_array_equal(parts[0][-16_000:], parts[1][:16_000])
    assert len(audio.windows(tone(480_000))) == 1


@pytest.mark.parametrize("total", [1, 5, 31, 32, 33, 100, 1439])
@pytest.mark.parametrize("fps", [None, 1.0, 0.3])
def test_frames_are_picked_as_published(total, fps):
    """Where the reference raises (fewer frames than asked for) all frames are taken."""
    picked = video.Sampling(fps=fps).pick(total, 24.0)
    wanted = 32 if fps is None else max(1, int(total / 24.0 * fps))
    reference = VideoMetadata(total_num_frames=total, fps=24.0)
    if wanted > total:
        assert picked == list(range(total))
    elif wanted <= 32:
        sampled = default_sample_indices_fn(reference, num_frames=None if fps else 32, fps=fps)
        assert picked == sampled.tolist()
    else:
        assert len(picked) == 32


def test_video_gives_frames_and_their_times():
    data = movie(frames=90, rate=30, height=64, width=96)
    frames = video.read_video(data, video.Sampling(frames=4), max_pixels=10_000, max_seconds=10)
    assert [f.stamp for f in frames] == ["00:00", "00:00", "00:01", "00:02"]
    assert all(f.pixels.shape[:2] == image.target_size(64, 96, 70) for f in frames)
    brightness = [f.pixels.mean() for f in frames]
    assert brightness == sorted(brightness) and brightness[-1] - brightness[0] > 60
    assert brightness == pytest.approx([index / 90 * 200 + 20 for index in (0, 22, 45, 67)], abs=6)


def test_short_video_gives_fewer_frames():
    assert len(video.read_video(movie(frames=5), video.Sampling(), max_pixels=10_000, max_seconds=10)) == 5


@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
def test_frames_that_outgrow_their_header_are_not_decoded(codec):
    data = b"".join(movie(6, 25, *size, codec=codec, container="mpegts") for size in ((48, 64), (600, 800)))
    within, above = (
        video.read_video(data, video.Sampling(frames=12), max_pixels=n, max_seconds=9) for n in (1_000_000, 10_000)
    )
    assert 0 < len(above) <= 6 < len(within)


def test_stamps_round_down_and_go_past_an_hour():
    assert video.Frame(np.zeros((48, 48, 3), np.uint8), 3725.9).stamp == "62:05"


def test_video_limits():
    data = movie(frames=60, rate=10)
    with pytest.raises(MediaError, match="6 seconds long, but at most 5"):
        video.read_video(data, video.Sampling(), max_pixels=10_000, max_seconds=5)
    with pytest.raises(MediaError, match=r"64 x 48 = 3,072 pixels, but at most 3,000"):
        video.read_video(data, video.Sampling(), max_pixels=3000, max_seconds=10)
    with pytest.raises(MediaError, match="no video track"):
        video.read_video(wav(tone(1000)), video.Sampling(), max_pixels=3000, max_seconds=10)


@pytest.mark.parametrize("rate", [240, 1_000_000])
def test_frames_are_counted_whatever_rate_is_stated(rate):
    data = movie(frames=121, rate=rate, height=16, width=16, codec="libx264")
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].average_rate == rate
    with pytest.raises(MediaError, match=r"more than 120 frames, the most that are allowed for 0\.5 seconds"):
        video.read_video(data, video.Sampling(), max_pixels=10_000, max_seconds=0.5)
    assert len(video.read_video(data, video.Sampling(frames=9), max_pixels=10_000, max_seconds=0.51)) == 9


def test_sound_track_of_a_video():
    data = movie(frames=30, rate=30, sound=tone(16_000))
    got = audio.read_audio(data, 30)
    assert abs(len(got) - 16_000) < 2100  # AAC pads its frames of 1,024 samples


def test_files_are_what_they_claim():
    """The helpers themselves: what they write, PyAV reads back with the properties asked for."""
    with av.open(io.BytesIO(movie(frames=7, rate=5, height=64, width=96))) as container:
        assert container.streams.video[0].average_rate == 5
        assert sum(1 for _ in container.decode(video=0)) == 7
