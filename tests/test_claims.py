"""Every claim on records drawn from the paper's own numbers, on its opposite, at an edge and without its
data."""

import functools
from collections import Counter
from dataclasses import replace

import planted
import pytest

import claims
import paper
from claims import CLAIMS, FAILS, HOLDS, UNDECIDED
from records import ACCURACY

DRAWS = 30


@functools.cache
def truth():
    return planted.points()


def ident(claim):
    return f"{claim.place} {getattr(claim.test, '__name__', '')} {' '.join(claim.methods)} {claim.metric.key}"


def keys_of(claim):
    """{method: {x: key of the planted point}} of the points that decide a claim."""
    target, found = paper.TARGETS[claim.target], {}
    group = target.version or ("deep" if target.deep else "wide")
    for key in truth():
        its_group, method, depth, bs = key
        whole = target.whole and method == "bn" and bs <= 64
        method = "bn (whole batch)" if whole else method
        x, (low, high) = depth if target.deep else bs, target.sizes
        fits = target.table != 1 or bs == 64
        if (
            its_group == group
            and method in claim.methods
            and low <= bs <= high
            and fits
            and claim.low <= x <= claim.high
        ):
            found.setdefault(method, {})[x] = key
    return found


def verdict(claim, points, seed=0, **changes):
    """The answer to a claim from these planted points alone."""
    sections = paper.make_sections(planted.draw(seed, points, **changes))
    answers = [answer for section in sections if (answer := claims.judge(section, claim))]
    return answers[0] if answers else None


def own(claim):
    """The planted points that a claim is about."""
    return {key: truth()[key] for line in keys_of(claim).values() for key in line.values()}


def behind(claim):
    """The first method is far behind the second wherever both were run."""
    one, two = (keys_of(claim)[method] for method in claim.methods)
    for x in one.keys() & two.keys():
        other, mine = truth()[two[x]], truth()[one[x]]
        yield one[x], replace(mine, accuracy=other.accuracy - 3, loss=1.5 * other.loss)


def change(method=0, at=slice(None), **changes):
    """An opposite: some points of one of the claim's methods differ; functions change what is there."""

    def opposite(claim):
        line = keys_of(claim)[claim.methods[method]]
        for x in sorted(line)[at]:
            point = truth()[line[x]]
            new = {key: value(point) if callable(value) else value for key, value in changes.items()}
            yield line[x], replace(point, **new)

    return opposite


def copy(source, target=0):
    """An opposite: one of the claim's methods is just like another."""

    def opposite(claim):
        line, other = keys_of(claim)[claim.methods[target]], keys_of(claim)[claim.methods[source]]
        for x in line.keys() & other.keys():
            yield line[x], replace(truth()[other[x]])

    return opposite


def less(points):
    return lambda point: point.accuracy - points


def times(factor):
    return lambda point: factor * point.loss


OPPOSITES = {
    "higher_after_tuning": copy(1),
    "independent_of_batch_size": change(0, slice(1), accuracy=less(3)),
    "falls_at_large_sizes": change(0, slice(-1, None), accuracy=97.0),
    "falls_at_small_sizes": change(0, slice(1), accuracy=97.0),
    "efficient_sizes": copy(1),
    "recovers_most": copy(1),
    "competitive": change(0, accuracy=less(3)),
    "loss_degrades": change(1, slice(-1, None), loss=times(20)),
    "similar_losses": change(0, loss=times(2)),
    "proportional": change(0, rate=0),
    "saturates": change(0, slice(-1, None), rate=7),
    "similar_rates": change(0, rate=lambda point: point.rate + 5),
    "saturation_rates": change(0, rate=lambda point: point.rate - 3),
    "larger_rates": change(0, slice(-1, None), rate=-6),
    "rate_is_not_the_reason": copy(1),
    "small_rates_suffice": change(0, slice(1), accuracy=less(3)),
    "plain_fails_at_depth": change(0, accuracy=91.0),
    "trains_very_deep": change(0, slice(-1, None), accuracy=less(20)),
    "rate_hardly_depends_on_depth": change(0, slice(-1, None), rate=-7, tied=()),
    "scalar_has_lowest_loss": change(0, loss=times(1.5)),
}
EITHER = {  # an opposite that is a tie with the truth's noise is pushed further
    "rate_is_not_the_reason": change(0, accuracy=less(6), loss=times(4)),
}


def opposite(claim):
    """The planted points of a claim with its opposite true."""
    name = claim.test.__name__
    if claim.leads:
        changed = behind(claim)
    elif name in OPPOSITES:
        changed = (EITHER.get(name) or OPPOSITES[name])(claim)
    else:  # it reaches a number
        changed = change(0, accuracy=less(8))(claim)
    return own(claim) | dict(changed)


def at_the_edge(points, metric):
    """No rate above the optimal one was run."""
    cut = {}
    for key, point in points.items():
        rate = point.rate if metric is ACCURACY or point.loss_rate is None else point.loss_rate
        cut[key] = replace(point, most=rate, tied=())
    return cut


def without(claim):
    """The points of a claim but those of its last method."""
    missing = set(keys_of(claim)[claim.methods[-1]].values())
    return {key: point for key, point in own(claim).items() if key not in missing}


def test_claims_hold_for_the_papers_own_numbers():
    """Each of them in at least 29 of 30 draws."""
    count = Counter()
    for seed in range(DRAWS):
        answers = claims.judge_all(paper.make_sections(planted.draw(seed, truth())))
        count.update(ident(answer.claim) for answer in answers if answer.verdict is HOLDS)
    assert len(CLAIMS) == len({ident(claim) for claim in CLAIMS})
    assert {ident(claim): count[ident(claim)] for claim in CLAIMS if count[ident(claim)] < DRAWS - 1} == {}


@pytest.mark.parametrize("claim", CLAIMS, ids=ident)
def test_claim_on_opposite_edge_and_missing(claim):
    """A claim that more rates could only strengthen is open where its opposite is at the edge."""
    assert verdict(claim, own(claim)).verdict is HOLDS
    against = verdict(claim, opposite(claim))
    assert against.verdict is FAILS, against
    only_rises = not claim.leads and claim.paper and not claim.rates
    edge = verdict(claim, at_the_edge(opposite(claim) if only_rises else own(claim), claim.metric))
    assert edge.verdict is UNDECIDED and "an optimum is on the edge" in edge.reason
    assert f"bash sweep.sh {claim.target}" in edge.command
    missing = verdict(claim, without(claim))
    assert missing is None or (missing.verdict is UNDECIDED and missing.reason.startswith("not run"))
