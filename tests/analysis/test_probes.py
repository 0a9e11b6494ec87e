"""Probes and what their token times say, against engines whose step law is known."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.calibration.probe_readings import read_probes, step_observation
from analysis.calibration.probes import Probe, design_probes
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, fit_step_time
from analysis.theory.kv_demand import kv_demand_engine, residence_steps
from loadgen.request_record import TokenRead
from loadgen.workload import uniform

LIMITS = EngineLimits(num_blocks=512, block_size=16, max_num_batched_tokens=2048)
LAW = StepTime(b0_s=0.014, b1_s_per_token=1e-5, b2_s_per_kv_token=4e-7, b3_s_per_request=1e-5)
WORKLOAD = uniform((16, 112), (16, 112))


def simulated(probe):
    lengths = [(probe.prompt_tokens, probe.output_tokens)] * probe.count
    lengths += [(probe.prompt_length, 1)] * probe.prompts
    arrivals = [0.0] * probe.count + [0.04 * (i + 1) for i in range(probe.prompts)]
    triples = np.array([(s, o, o) for s, o in lengths])
    return simulate(LIMITS, LAW, np.array(arrivals), triples, 600.0).records


def observe(probe):
    return step_observation(simulated(probe))


def reads_of(run, interval=1):
    """The tokens of a simulated batch whose prompts each fit one step: one a step, and a read of every
    ``interval``-th."""
    ends_ns = np.round(1e9 * (run.steps.start_s + run.steps.duration_s)).astype(int)
    reads = []
    for record in run.records:
        begin = int(np.argmin(np.abs(ends_ns - record.first_token_ns)))
        told = [n for n in range(record.output_tokens) if n % interval == 0]
        told = sorted({*told, record.output_tokens - 1})
        reads.append(tuple(TokenRead(int(ends_ns[begin + n]), n + 1) for n in told))
        assert abs(reads[-1][-1].t_ns - record.last_token_ns) < 10
    return reads


def test_observations_reproduce_the_law_without_noise() -> None:
    for probe in design_probes(WORKLOAD, LIMITS):
        if probe.output_tokens == 1:
            continue
        seen = observe(probe)
        expected = (
            seen.steps * LAW.b0_s
            + seen.tokens * LAW.b1_s_per_token
            + seen.kv_tokens * LAW.b2_s_per_kv_token
            + seen.running * LAW.b3_s_per_request
        )
        assert seen.duration_s == pytest.approx(expected, rel=2e-3), probe.name


@pytest.mark.parametrize("read_us", [20, 60])
def test_how_long_a_client_reads_the_tokens_of_a_step_does_not_lengthen_it(read_us) -> None:
    for probe in design_probes(WORKLOAD, LIMITS):
        if probe.output_tokens == 1 or probe.prompts:
            continue
        # All begin in one step, in any order, and end in one step, in the order of their numbers.
        records = simulated(probe)
        if len({r.first_token_ns for r in records}) > 1:
            continue
        late = [
            replace(
                r,
                first_token_ns=r.first_token_ns + 1000 * read_us * (r.id * 7 % 10),
                last_token_ns=r.last_token_ns + 1000 * read_us * r.id,
            )
            for r in records
        ]
        true, seen = step_observation(records), step_observation(late)
        assert seen.duration_s == pytest.approx(true.duration_s, rel=1e-6), probe.name
        assert seen.tokens == pytest.approx(true.tokens, rel=0.02)


@pytest.mark.parametrize("interval", [1, 8])
def test_ends_that_are_told_late_do_not_change_the_steps_before_them(interval) -> None:
    """Prompts over several steps: most of a batch ends in the same step, each end takes the server
    0.2 ms to tell, and the request that is observed ends in one of the next."""
    limits = replace(LIMITS, max_num_batched_tokens=512)
    apart = 0
    for probe in design_probes(WORKLOAD, limits):
        if probe.output_tokens == 1 or probe.prompts or probe.count == 1:
            continue
        lengths = np.array([(probe.prompt_tokens, *[probe.output_tokens] * 2)] * probe.count)
        run = simulate(limits, LAW, np.zeros(probe.count), lengths, 600.0)
        reads = reads_of(run, interval)
        late = [
            replace(r, last_token_ns=r.last_token_ns + 200_000 * probe.count) for r in run.records
        ]
        seen = step_observation(late, law=LAW, reads=reads)
        held = np.array([seen.steps, seen.tokens, seen.kv_tokens, seen.running])
        assert seen.duration_s == pytest.approx(held @ LAW.coefficients(), rel=2e-3), probe.name
        last = max(r.output_tokens for r in run.records) - 1
        assert 0.7 * (last - interval - 12) <= seen.steps < last
        assert seen.steps + seen.left_out_steps == last
        without = step_observation(late, law=LAW)
        held = np.array([without.steps, without.tokens, without.kv_tokens, without.running])
        assert without.left_out_steps == 0 and without.steps == last
        apart += abs(without.duration_s / (held @ LAW.coefficients()) - 1) > 3e-3
    assert apart >= 3


def test_a_token_that_is_read_late_moves_the_end_by_its_share_alone() -> None:
    """One read of the last ten waits for half a step: a sixteenth of that remains."""
    for probe in design_probes(WORKLOAD, LIMITS):
        if probe.output_tokens == 1 or probe.prompts:
            continue
        lengths = np.array([(probe.prompt_tokens, *[probe.output_tokens] * 2)] * probe.count)
        run = simulate(LIMITS, LAW, np.zeros(probe.count), lengths, 600.0)
        reads = [
            (*each[:-4], TokenRead(each[-4].t_ns + 8_000_000, each[-4].tokens), *each[-3:])
            for each in reads_of(run)
        ]
        seen = step_observation(run.records, law=LAW, reads=reads)
        held = np.array([seen.steps, seen.tokens, seen.kv_tokens, seen.running])
        assert seen.duration_s == pytest.approx(held @ LAW.coefficients(), rel=1.5e-3), probe.name


@pytest.mark.parametrize("interval", [1, 8])
def test_steps_that_scatter_are_neither_shortened_nor_lengthened(interval) -> None:
    """One request, steps of 20 ms with 10 %: the mean of 2 000 observations within 3 standard errors."""
    rng, rates = np.random.default_rng(13), []
    law = StepTime(b0_s=0.02)
    alone = simulated(Probe(name="alone", prompt_tokens=8, output_tokens=64, count=1))[0]
    for _ in range(2000):
        ends = np.cumsum(0.02e9 * (1 + 0.1 * rng.standard_normal(64))).astype(int)
        record = replace(alone, first_token_ns=int(ends[0]), last_token_ns=int(ends[-1]))
        told = [n for n in range(64) if n % interval == 0 or n == 63]
        reads = [tuple(TokenRead(int(ends[n]), n + 1) for n in told)]
        seen = step_observation([record], law=law, reads=reads)
        rates.append(seen.duration_s / seen.steps / 0.02 - 1)
    assert seen.steps < 60
    assert abs(np.mean(rates)) < 3 * np.std(rates) / np.sqrt(len(rates))


def test_a_first_read_of_several_tokens_begins_after_them() -> None:
    probe = next(p for p in design_probes(WORKLOAD, LIMITS) if p.name == "few")
    lengths = np.array([(probe.prompt_tokens, *[probe.output_tokens] * 2)] * probe.count)
    run = simulate(LIMITS, LAW, np.zeros(probe.count), lengths, 600.0)
    # The third token brings the first two along.
    reads = [each[2:] for each in reads_of(run)]
    late = [
        replace(r, first_token_ns=each[0].t_ns) for r, each in zip(run.records, reads, strict=True)
    ]
    seen = step_observation(late, law=LAW, reads=reads)
    held = np.array([seen.steps, seen.tokens, seen.kv_tokens, seen.running])
    assert seen.duration_s == pytest.approx(held @ LAW.coefficients(), rel=2e-3)


def test_a_token_of_the_first_half_tells_too_little() -> None:
    probe = next(p for p in design_probes(WORKLOAD, LIMITS) if p.name == "short")
    lengths = np.array([(probe.prompt_tokens, *[probe.output_tokens] * 2)] * probe.count)
    run = simulate(LIMITS, LAW, np.zeros(probe.count), lengths, 600.0)
    whole = step_observation(run.records)
    for reads in (
        [each[: probe.output_tokens // 3] for each in reads_of(run)],
        [each[-1:] for each in reads_of(run)],
        [() for _ in run.records],
    ):
        assert step_observation(run.records, reads=reads) == whole


def test_the_probes_tell_the_four_terms_apart() -> None:
    probes = [p for p in design_probes(WORKLOAD, LIMITS) if p.output_tokens > 1]
    fit = fit_step_time([observe(p) for p in probes for _ in range(3)])
    assert fit.condition_number < 30
    assert fit.law.coefficients() == pytest.approx(LAW.coefficients(), rel=0.05)


@pytest.mark.parametrize("budget", [128, 2048])
def test_half_of_a_batch_decodes_at_once_however_long_its_prompts_take(budget) -> None:
    """At 128 tokens a step the prompts of a typical batch take more than twice as long as its outputs
    did: none of them would see the last one begin."""
    limits = replace(LIMITS, max_num_batched_tokens=budget, num_blocks=2048, max_model_len=1024)
    law = uniform((100, 300), (100, 300))
    for probe in design_probes(law, limits):
        if probe.output_tokens == 1 or probe.prompts:
            continue
        lengths = np.array([(probe.prompt_tokens, *[probe.output_tokens] * 2)] * probe.count)
        records = simulate(limits, LAW, np.zeros(probe.count), lengths, 600.0).records
        begun = max(r.first_token_ns for r in records)
        decoding = sum(r.last_token_ns > begun for r in records)
        assert decoding >= probe.count / 2, probe.name


@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("blocks", [64, 300, 5000])
@pytest.mark.parametrize(
    "lengths", [((16, 112), (16, 112)), ((400, 800), (8, 20)), ((4, 9), (200, 700))]
)
def test_probes_fit_the_pool_and_meet_the_ceilings_that_matter(blocks, lengths, budget) -> None:
    workload = uniform(*lengths)
    longest = int((workload.prompt_tokens + workload.output_tokens).max())
    limits = EngineLimits(
        num_blocks=blocks,
        block_size=16,
        max_model_len=max(longest, 200),
        max_num_batched_tokens=budget,
    )
    if longest > limits.pool_tokens:
        pytest.skip("the workload does not fit")
    chunk = int(workload.prompt_tokens.max())
    demand = workload.mean(kv_demand_engine(workload.prompt_tokens, workload.output_tokens, chunk))
    steps = workload.mean(residence_steps(workload.prompt_tokens, workload.output_tokens, chunk))
    for probe in design_probes(workload, limits):
        per_request = -(-(probe.prompt_tokens + probe.output_tokens) // 16)
        if probe.output_tokens > 1:
            assert probe.count * per_request <= blocks
        assert probe.prompt_tokens + probe.output_tokens <= limits.max_model_len
        assert probe.prompt_length + 1 <= limits.max_model_len
        assert probe.count >= 1
    short = next(p for p in design_probes(workload, limits) if p.name == "short")
    running = limits.pool_tokens / demand * steps
    room = blocks * 0.7 / -(-(short.prompt_tokens + short.output_tokens) // 16)
    assert short.count >= min(running, int(room), 400) * 0.99


def test_no_prompt_is_counted_in_a_step_that_computed_a_part_of_it() -> None:
    """A batch whose prompts end in the middle of a step: the next prompt would begin in that step."""
    limits = EngineLimits(num_blocks=409, block_size=32, max_num_batched_tokens=512)
    law = StepTime(b0_s=0.02147, b1_s_per_token=79e-6)
    probes = design_probes(uniform((2, 160), (2, 160)), limits)
    (probe,) = (p for p in probes if p.name == "small prompts")
    assert probe.count * probe.prompt_tokens % 512 > 0 < probe.prompts

    def off(first_s: float) -> float:
        """Observed duration over the law's, less 1; the first prompt behind the batch is sent at
        ``first_s``, each other one when the one before is answered."""
        arrivals, next_s = [0.0] * probe.count, first_s
        for number in range(probe.count, len(probe.lengths)):
            arrivals.append(next_s)
            triples = np.array([(s, o, o) for s, o in probe.lengths[: number + 1]])
            records = simulate(limits, law, np.array(arrivals), triples, 600.0).records
            next_s = records[number].last_token_ns / 1e9
        seen = step_observation(records, law=law)
        expected = seen.steps * law.b0_s + seen.tokens * law.b1_s_per_token
        return seen.duration_s / expected - 1

    triples = np.array([(s, o, o) for s, o in probe.lengths[: probe.count]])
    batch = simulate(limits, law, np.zeros(probe.count), triples, 600.0).records
    in_s = max(r.first_token_ns for r in batch) / 1e9
    assert abs(off(in_s)) < 0.002
    assert off(0.0) * (probe.output_tokens - 1) < -0.5  # steps


@pytest.mark.parametrize("b0_s", [0.004, 0.02])
@pytest.mark.parametrize("budget", [256, 512])
@pytest.mark.parametrize(
    "lengths", [((8, 300), (8, 160)), ((8, 1200), (8, 32)), ((8, 64), (8, 600))]
)
def test_a_batch_that_begins_over_many_steps_is_counted_in_the_steps_it_shares(
    lengths, budget, b0_s
) -> None:
    """The first of the batch end steps before the last, and those last steps are the shortest: shares
    of the time would be off by up to 20 %."""
    limits = EngineLimits(num_blocks=2000, block_size=16, max_num_batched_tokens=budget)
    law = StepTime(b0_s=b0_s, b1_s_per_token=8e-5, b2_s_per_kv_token=3e-7)
    ending_apart = 0
    for probe in design_probes(uniform(*lengths), limits):
        if probe.output_tokens == 1 or probe.prompts:
            continue
        triples = np.array([(probe.prompt_tokens, *[probe.output_tokens] * 2)] * probe.count)
        # As they are sent: one after another, in less than a step of prompts.
        arrivals = np.linspace(0, 0.01, probe.count)
        records = simulate(limits, law, arrivals, triples, 600.0).records
        ending_apart += len({r.last_token_ns for r in records}) > 3
        seen = step_observation(records, law=law)
        expected = (
            seen.steps * law.b0_s
            + seen.tokens * law.b1_s_per_token
            + seen.kv_tokens * law.b2_s_per_kv_token
        )
        assert seen.duration_s == pytest.approx(expected, rel=3e-3), probe.name
    assert ending_apart >= 2


def test_probes_read_with_their_own_law_give_that_of_the_server() -> None:
    """A small token budget: batches begin over many steps, and nobody tells how long each took."""
    limits = EngineLimits(num_blocks=2048, block_size=16, max_num_batched_tokens=256)
    law = StepTime(b0_s=0.01, b1_s_per_token=6e-5, b2_s_per_kv_token=2e-7, b3_s_per_request=9e-5)
    probes = []
    for probe in design_probes(uniform((16, 160), (16, 80)), limits):
        if probe.output_tokens == 1 or (probe.prompts and probe.count > 1):
            continue
        lengths = [(probe.prompt_tokens, probe.output_tokens)] * probe.count
        lengths += [(probe.prompt_length, 1)] * probe.prompts
        arrivals = [0.0] * probe.count + [0.05 * (i + 1) for i in range(probe.prompts)]
        triples = np.array([(s, o, o) for s, o in lengths])
        records = simulate(limits, law, np.array(arrivals), triples, 600.0).records
        probes.append((probe.name, records, ()))
    fit, seen = read_probes(probes)
    assert [each.probe for each in seen] == [name for name, *_ in probes]
    assert fit.law.coefficients() == pytest.approx(law.coefficients(), rel=0.02)
    once = fit_step_time([step_observation(records) for _, records, _ in probes])
    assert once.residual_relative > 10 * fit.residual_relative
