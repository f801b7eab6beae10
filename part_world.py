"""The claims of world.py: its renderer, its judge, its events. Plain numpy, seconds on one core."""
import time

import numpy as np
import pytest

import world
from world import Motion, World, chance, clip, events, held, judge, panorama, recall_at, render, turning_rate


# ---- helpers ---------------------------------------------------------------------------------------------------------

def blurred(frames):
    """Each pixel mixed with its neighbours, 1 2 1, both ways."""
    x = np.pad(frames, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4


def noised(frames, db=26):
    noise = np.random.default_rng(7).standard_normal(frames.shape, np.float32)
    return frames + np.float32(10 ** (-db / 20)) * noise


def tinted(frames):
    """Generated frames drift like this: warmer, darker, and smooth patches of wrong colour."""
    patches = np.random.default_rng(9).normal(0, .02, (len(frames), 3, 4, 8)).repeat(8, 2).repeat(8, 3)
    return .9 * frames + np.array([.05, 0, -.02], np.float32)[:, None, None] + patches.astype(np.float32)


def judge_errors(through=lambda frames: frames, seeds=range(12), frames=160):
    """
    Reads held-out clips after `through`, frames -> frames: where an autoencoder goes to be tested.
    returns  share of landmarks wholly in view that are read right and readable; all heading errors, columns;
             share of frames with the right ground; whole-frame and box PSNR, means over frames: the ceiling
    """
    right, wrong_by, ground, psnr, box = [], [], [], [], []
    for seed in seeds:
        w = world.world(world.HELD_OUT + seed)
        heading = w.motion.heading(w.start, np.arange(frames))
        reading = judge(through(clip(world.HELD_OUT + seed, 0, frames)))
        whole = np.abs(world.offsets(heading)) <= world.WHOLE - .5  # at the very edge a rounded heading may differ
        right.append((reading.sure == np.array(w.landmarks))[whole])
        wrong_by.append(np.abs(world.wrap(reading.heading - heading)))
        ground.append(reading.ground == w.ground)
        psnr.append(reading.psnr)
        box.append(reading.box_psnr)
    right, wrong_by, ground, psnr, box = map(np.concatenate, (right, wrong_by, ground, psnr, box))
    return right.mean(), wrong_by, ground.mean(), psnr.mean(), np.nanmean(box)


def film(headings, landmarks, ground=0):
    """Frames at these headings; landmarks (8,) or, where they change over time, (f, 8)."""
    landmarks = np.broadcast_to(landmarks, (len(headings), 8))
    frames = np.empty((len(headings), 3, 32, 64), np.float32)
    for row in np.unique(landmarks, axis=0):
        same = (landmarks == row).all(1)
        frames[same] = render(panorama(ground, row), np.asarray(headings)[same])
    return frames


STEADY = "Grass. The camera turns right, one turn in 8 seconds."  # 2 columns a frame
ASIDE = "Grass. The camera looks 180 degrees to the right and back, every 16 seconds."  # 1 column a frame
SET = np.array([0, 7, 14, 21, 4, 11, 12, 19])


def steady(frames, start=0.):
    return Motion("turn", 1, 8).heading(start, np.arange(frames))


def strange(mix, ground):
    """Confidences of landmarks wholly in view where mix(sheet, a, b) stands, for random pairs a, b of landmarks."""
    rng, found = np.random.default_rng(3), []
    sheets = world.sheets(ground).reshape(24, 8, 256, 32, 3)  # landmark, sector, sub-column
    for _ in range(12):
        pairs = [rng.choice(24, 2, replace=False) for _ in range(8)]
        pano = np.concatenate([mix(sheets[:, s], a, b) for s, (a, b) in enumerate(pairs)])
        reading = judge(render(pano, rng.uniform(0, 256, 24)))
        found.append(reading.confidence[reading.landmark >= 0])
    return np.concatenate(found)


# ---- the world -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["turn", "linger", "aside"])
def test_any_window_of_a_clip_is_the_same_as_that_part_of_the_whole(kind):
    whole = clip(11, 0, 200, kind)
    assert np.array_equal(clip(11, 0, 200, kind), whole)
    assert np.array_equal(clip(11, 137, 40, kind), whole[137:177])


def test_training_and_held_out_seeds_never_give_the_same_world():
    # Seeds below HELD_OUT and from it on are different numbers, so what could meet is what is drawn from them: start
    # is a 53-bit uniform and the landmarks one of 24 ** 8, so that two of 2,000 + 2,000 agree with probability 4e-5.
    train = [world.world(s) for s in range(2000)]
    held_out = [world.world(world.HELD_OUT + s) for s in range(2000)]
    assert not {w.landmarks for w in train} & {w.landmarks for w in held_out}
    assert len({w.start for w in train + held_out}) == 4000


def test_motions_are_mixed_as_documented():
    kinds = [world.world(s).motion.kind for s in range(4000)]
    shares = [kinds.count(k) / 4000 for k in ("turn", "linger", "aside")]
    assert np.allclose(shares, (.5, .3, .2), atol=.03)  # 4 standard deviations


def test_captions_round_trip_and_fit_in_96_bytes():
    motions = [Motion("turn", d, s) for d in (-1, 1) for s in range(8, 45)]
    motions += [Motion("linger", d, s) for d in (-1, 1) for s in range(18, 45)]
    motions += [Motion("aside", d, s, a) for d in (-1, 1) for a in (90, 135, 180) for s in range(4, 17)]
    for ground in range(4):
        for motion in motions:
            caption = World(ground, (0,) * 8, 0., motion).caption
            assert world.parse_caption(caption) == (ground, motion)
            assert len(caption.encode()) <= 96
    for foreign in ("", "A cat.", STEADY.replace("Grass", "Lava"), STEADY + " Slowly."):
        assert world.parse_caption(foreign) is None


def test_captions_never_tell_the_landmarks():
    words = " ".join(world.world(s).caption for s in range(300)).lower()
    assert not any(name in words for name in world.SHAPES + world.COLOURS)


@pytest.mark.parametrize("shape", range(4))
def test_sharpness_does_not_pulse_with_sub_pixel_phase(shape):
    # Rms difference of neighbouring pixels while a landmark passes one column in steps of 1/64: constant within 10 %
    # (worst: the square's sides on snow, 9 %), where plain pixel coverage, not softened, pulses by up to 38 %.
    for colour in range(6):
        frames = render(panorama(2, [6 * shape + colour] * 8), 16 + np.arange(64) / 64)
        rms = (np.diff(frames[:, :, 7:25].astype(np.float64), axis=-1) ** 2).mean((1, 2, 3)) ** .5
        assert rms.max() / rms.min() < 1.10


def test_rendering_makes_2000_frames_a_second_on_one_core():
    clip(5, 0, 16)  # drawings are cached: this is about frames
    seconds = []
    for _ in range(3):  # best of 3, for other work may run beside
        begin = time.perf_counter()
        clip(5, 0, 960)
        seconds.append(time.perf_counter() - begin)
    assert 960 / min(seconds) >= 2000


# ---- the judge -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("through, ceiling", [(lambda x: x, 40), (noised, 25), (blurred, 22),
                                              (lambda x: noised(blurred(x)), 21), (tinted, 21)],
                         ids=["rendered", "26 dB", "blurred", "blurred and 26 dB", "tinted"])
def test_judge_reads_99_percent_of_landmarks_right_and_headings_within_one_column(through, ceiling):
    right, wrong_by, ground, psnr, _ = judge_errors(through)
    assert right >= .99
    assert wrong_by.max() <= 1
    assert ground == 1
    assert psnr >= ceiling


def test_judge_reads_every_landmark_on_every_ground_and_in_every_sector():
    headings = np.arange(8) * 32 + 16
    for ground in range(4):
        for a in range(24):
            reading = judge(film(headings, [a] * 8, ground))
            assert (reading.sure[np.arange(8), np.arange(8)] == a).all()
            assert (reading.ground == ground).all()


def test_judge_takes_uint8_as_well_as_float():
    frames = clip(21, 0, 32)
    a, b = judge(frames), judge((frames * 255).round().astype(np.uint8))
    assert np.array_equal(a.sure, b.sure) and np.abs(a.heading - b.heading).max() <= 1 / 4


def test_landmarks_are_reported_only_when_wholly_in_view_with_two_columns_to_spare():
    offset = np.arange(-48, 48.)  # sector 3 from one side of the view to the other
    reading = judge(film(112 - offset, SET))
    assert np.array_equal(reading.landmark[:, 3] >= 0, np.abs(offset) <= 21)
    assert (reading.confidence[np.abs(offset) > 21, 3] == 0).all()


@pytest.mark.parametrize("ground", [0, 2])
def test_half_and_half_landmarks_have_low_confidence(ground):
    found = strange(lambda sheet, a, b: np.concatenate([sheet[a, :128], sheet[b, 128:]]), ground)
    assert (found < world.READABLE).mean() >= .99 and np.median(found) < .2


@pytest.mark.parametrize("ground", [0, 2])
def test_morphs_at_50_percent_have_low_confidence(ground):
    found = strange(lambda sheet, a, b: (sheet[a] + sheet[b]) / 2, ground)
    assert (found < world.READABLE).all() and np.median(found) < .1


@pytest.mark.parametrize("ground", [0, 2])
def test_colours_between_two_classes_have_low_confidence(ground):
    def mix(sheet, a, b):  # same shape, both colours; where they agree, the next colour
        return (sheet[a] + sheet[a // 6 * 6 + (b % 6 if b % 6 != a % 6 else (b + 1) % 6)]) / 2
    found = strange(mix, ground)
    assert (found < world.READABLE).all() and np.median(found) < .2


@pytest.mark.parametrize("fill", ["grey", "noise", "nothing"])
def test_boxes_without_a_landmark_are_not_readable(fill):
    rng = np.random.default_rng(4)
    sub = slice(128 - 9 * world.SUB, 128 + 9 * world.SUB)

    def mix(sheet, a, b):
        drawn = sheet[a].copy()
        if fill == "grey":
            drawn[sub, 6:26] = rng.uniform(0, 1)
        elif fill == "noise":
            drawn[sub, 6:26] = rng.uniform(0, 1, (18, 20, 3)).repeat(world.SUB, 0)
        else:
            drawn = world.background(1).reshape(8, 256, 32, 3)[0].copy()
        return drawn
    assert (strange(mix, 1) < world.READABLE).all()


def test_grey_noise_and_frozen_frames_are_told_apart():
    rng = np.random.default_rng(5)
    grey = np.full((40, 3, 32, 64), .5, np.float32) * rng.uniform(.2, 1.8, (40, 1, 1, 1)).astype(np.float32)
    noise = rng.uniform(0, 1, (40, 3, 32, 64)).astype(np.float32)
    coarse = rng.uniform(0, 1, (40, 3, 4, 8)).repeat(8, 2).repeat(8, 3)
    assert (judge(grey).kind == "grey").all() and (judge(noised(grey)).kind == "grey").all()
    assert (judge(noise).kind == "noise").all() and (judge(coarse).kind == "noise").all()
    assert (judge(np.repeat(clip(8, 0, 1), 40, 0)).kind == "frozen").all()
    for kind in ("turn", "linger", "aside"):  # also where it lingers, and where it turns back
        for seed in range(3):
            assert (judge(noised(clip(seed, 0, 300, kind))).kind == "ok").all()


def test_a_still_camera_is_frozen_but_valid_and_still_read():
    reading = judge(film(np.full(64, 48.), SET))
    assert (reading.kind == "frozen").all() and (reading.psnr > world.VALID).all()
    assert (reading.sure[:, 1] == SET[1]).all()


def test_a_video_that_stops_is_frozen_from_there_on():
    heading = np.minimum(np.arange(200), 100) * 1.
    kind = judge(film(heading, SET)).kind
    assert (kind[:90] == "ok").all() and (kind[120:] == "frozen").all()


def test_validity_is_the_size_of_the_damage_and_in_the_boxes_only_if_it_is_there():
    frames = film(np.linspace(40, 56, 64), SET)  # sector 1 always in view
    for db in (30, 26, 22):
        reading = judge(noised(frames, db))
        assert abs(reading.psnr.mean() - db) < .3 and abs(reading.box_psnr.mean() - db) < .3
    above, inside = frames.copy(), frames.copy()
    above[:, :, :4] = noised(frames, 10)[:, :, :4]
    inside[:, :, 15:17] = noised(frames, 10)[:, :, 15:17]
    above, inside = judge(above), judge(inside)
    assert (above.psnr < 20).all() and (above.box_psnr > 30).all()
    assert (inside.box_psnr < 22).all() and (inside.psnr > inside.box_psnr).all()


def test_a_minute_of_video_is_judged_in_about_a_second():
    frames = clip(9, 0, 960)
    judge(frames[:32])
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        judge(frames)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1


# ---- events ----------------------------------------------------------------------------------------------------------

def test_in_a_steady_turn_every_landmark_comes_back_right_and_after_the_time_that_geometry_gives():
    found = events(judge(noised(film(steady(480), SET))), STEADY)
    assert len(found) == 3 * 8 and all(e.recall and e.drift and not e.miss for e in found)
    # out of view over 256 - 2 x 41 columns at 32 a second; within one frame at either end
    assert all(abs(e.seconds - 174 / 32) <= 2 / 16 for e in found)
    share, count = recall_at(found, 174 / 32)
    assert share == 1 and count == sum(not e.sink for e in found) > 0
    assert recall_at(found, 20)[1] == 0


@pytest.mark.parametrize("kind", ["turn", "linger", "aside"])
def test_in_rendered_worlds_every_return_is_right_and_none_is_missed(kind):
    for seed in range(world.HELD_OUT, world.HELD_OUT + 4):
        w = world.world(seed, kind)
        reading = judge(noised(clip(seed, 0, 800, kind)))
        found = events(reading, w.caption)
        assert all(e.recall and e.drift and e.read == w.landmarks[e.sector] and not e.miss for e in found)
        assert abs(turning_rate(reading, w.caption) - 1) < .02
        assert found or w.motion.seconds > 35 or kind == "aside"


def test_a_landmark_swapped_while_out_of_view_is_wrong_exactly_there():
    landmarks = np.tile(SET, (480, 1))
    landmarks[120:, 4] = 22  # sector 4 is straight ahead at frame 72 and at 200
    found = events(judge(film(steady(480), landmarks)), STEADY)
    wrong = [e for e in found if not e.recall]
    assert len(wrong) == 1 and wrong[0].sector == 4 and wrong[0].due < 200
    assert (wrong[0].before, wrong[0].read) == (SET[4], 22)
    assert [e.drift for e in found if e.sector == 4] == [False] * 3  # and stays away from the first reading


def test_a_landmark_that_changes_and_changes_back_is_wrong_twice_but_drifts_once():
    landmarks = np.tile(SET, (480, 1))
    landmarks[120:240, 4] = 22
    mine = [e for e in events(judge(film(steady(480), landmarks)), STEADY) if e.sector == 4]
    assert [e.recall for e in mine] == [False, False, True]
    assert [e.drift for e in mine] == [False, True, True]


def test_what_changes_in_view_is_not_the_absences_fault():
    landmarks = np.tile(SET, (480, 1))
    landmarks[200:, 4] = 22  # straight ahead
    mine = [e for e in events(judge(film(steady(480), landmarks)), STEADY) if e.sector == 4]
    assert [e.recall for e in mine] == [True, True, True]
    assert [e.drift for e in mine] == [True, False, False]


def test_an_unreadable_return_is_wrong():
    frames = film(steady(240), SET)
    mush = (film(steady(240), SET) + film(steady(240), np.roll(SET, 1))) / 2
    frames[128:] = mush[128:]
    back = [e for e in events(judge(frames), STEADY) if e.due >= 128]
    assert back and all(e.read == -1 and not e.recall and not e.drift and not e.miss for e in back)


def test_a_return_that_the_caption_makes_due_and_that_does_not_come_is_a_miss():
    heading = steady(480)
    heading[100:] = heading[100]  # after 200 of 256 columns
    reading = judge(film(heading, SET))
    found = events(reading, STEADY)
    assert found and all(e.miss and e.read == -1 and not e.recall for e in found)
    assert {e.sector for e in found} == {7, 0, 1, 2, 3, 4}  # those that were read and had left
    assert all(abs(e.seconds - 174 / 32) <= 2 / 16 for e in found)
    assert all(abs(e.due - e.left - (256 - 41 - 21) / 2) <= 2 for e in found)
    assert events(reading, "A merry-go-round.") == []
    assert events(judge(film(heading[:140], SET)), STEADY) == []  # the first deadline is 13 + 1.25 x 97 + 16


def test_a_camera_that_should_look_back_and_does_not_is_a_miss_after_the_time_that_looking_back_takes():
    heading = Motion("aside", 1, 16, 180).heading(40., np.arange(400))
    found = events(judge(film(heading, SET)), ASIDE)
    assert found and all(e.recall and e.drift and not e.miss for e in found)
    heading[128:] = heading[128]  # stays where it should turn back
    stays = events(judge(film(heading, SET)), ASIDE)
    assert stays and all(e.miss for e in stays)
    seconds = {e.sector: e.seconds for e in reversed(found)}  # of each sector's first absence
    assert all(abs(e.seconds - seconds[e.sector]) < .2 for e in stays)


def test_a_return_far_too_late_is_a_miss_and_a_little_late_is_not():
    late = events(judge(film(steady(600) * .6, SET)), STEADY)
    assert late and all(e.miss for e in late)
    slow = events(judge(film(steady(600) * .9, SET)), STEADY)
    assert slow and all(e.recall and not e.miss for e in slow)


def test_landmarks_in_the_first_nine_frames_are_the_sinks():
    # headings 40 .. 56 in the first 9 frames: sector 1 (middle 48) and, from heading 59 on, too late, sector 2
    found = events(judge(film(steady(300, start=40.), SET)), STEADY)
    assert {e.sector for e in found if e.sink} == {1} and {e.sector for e in found} == set(range(8))
    # a frame more or less decides: at 43 the ninth frame sees heading 59, and 80 - 59 = 21
    found = events(judge(film(steady(300, start=43.), SET)), STEADY)
    assert {e.sector for e in found if e.sink} == {1, 2}


def test_misread_headings_make_no_visits():
    reading = judge(film(steady(480), SET))
    clean = events(reading, STEADY)
    rng = np.random.default_rng(6)
    reading.heading += rng.normal(0, .7, 480)
    for frame in range(20, 470, 40):
        reading.heading[frame:frame + 4] += rng.uniform(40, 216)
    reading.heading %= 256
    noisy = events(reading, STEADY)
    assert [(e.sector, e.recall, e.miss) for e in noisy] == [(e.sector, e.recall, e.miss) for e in clean]
    assert abs(turning_rate(reading, STEADY) - 1) < .05


def test_turning_rate_tells_half_speed_the_wrong_way_and_a_stop():
    for rate in (1, .5, -1, -.5, 0):
        assert abs(turning_rate(judge(film(steady(200, start=9.) * rate, SET)), STEADY) - rate) < .02
    aside = Motion("aside", 1, 16, 180).heading(40., np.arange(512))
    assert abs(turning_rate(judge(film(aside, SET)), ASIDE) - 1) < .02
    assert abs(turning_rate(judge(film(80 - aside, SET)), ASIDE) + 1) < .02
    assert np.isnan(turning_rate(judge(film(aside, SET)), "A cat."))


def test_chance_is_the_true_agreement_of_random_worlds():
    rng, headings = np.random.default_rng(8), np.arange(8) * 32 + 16.
    fair = [judge(film(headings, rng.integers(24, size=8))) for _ in range(60)]
    assert abs(chance(fair) - 1 / 24) < .008  # 14,160 pairs
    blue = [judge(film(headings, rng.integers(4, size=8) * 6 + 4)) for _ in range(40)]  # a model that loves blue
    assert abs(chance(blue) - 1 / 4) < .03
    assert chance(fair[:1] * 2) == 1 and np.isnan(chance(fair[:1]))


def test_held_is_true_exactly_for_contexts_with_a_latent_that_shows_the_landmark():
    heading = steady(300)
    reading = judge(film(heading, SET))
    event = next(e for e in events(reading, STEADY) if e.sector == 4)  # wholly in view while 123 <= heading <= 165
    shows = [j for j in range(40) if any(123 <= heading[f] <= 165 for f in range(max(0, 4 * j - 3), 4 * j + 1))]
    assert [j for j in range(40) if held(event, reading, [j])] == shows
    assert not held(event, reading, []) and held(event, reading, [0, 1, shows[0]])


def test_chunks_are_nine_frames_and_then_twelve():
    chunks = [world.chunk_of(f) for f in range(33)]
    assert chunks == [0] * 9 + [1] * 12 + [2] * 12
