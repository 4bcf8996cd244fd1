//! Guests that write faster than the wire carries, and what orders make of them.

use proptest::prelude::*;

use super::super::*;
use super::{GIB, MIB, MS, conditions};
use crate::PAGE_SIZE;

/// A guest that writes all over its working set, and the wire that it is moved over.
#[derive(Debug, Clone, Copy)]
struct Setting {
    ram: u64,
    working_set: u64,
    /// What it writes if nobody slows it, in bytes per second, rewriting included.
    writes: f64,
    wire: f64,
    /// What an iteration takes besides sending.
    overhead: Duration,
    /// Slowing it has an effect.
    obeys: bool,
}

const FLAT_OUT: Setting = Setting {
    ram: GIB,
    working_set: GIB / 2,
    writes: 10e9,
    wire: 250e6,
    overhead: Duration::from_millis(10),
    obeys: true,
};

/// How a migration went.
#[derive(Debug)]
struct End {
    verdict: Verdict,
    iterations: u32,
    /// Every target of a stun, and the iteration after which it was set.
    stuns: Vec<(u32, u64)>,
    bytes_sent: u64,
}

impl Setting {
    fn run(&self, policy: Policy) -> End {
        let mut convergence = Convergence::new(policy);
        let (predictor, now) = (Predictor::new(), conditions(self.wire));
        if let Some(verdict) = convergence.before_iterations(self.ram, &now, &predictor) {
            return End { verdict, iterations: 0, stuns: Vec::new(), bytes_sent: 0 };
        }
        let (mut remaining, mut stuns, mut bytes_sent) = (self.ram, Vec::new(), 0);
        for number in 1.. {
            bytes_sent += remaining;
            let duration =
                Duration::from_secs_f64(remaining as f64 / self.wire) + now.round_trip + self.overhead;
            let dirtied_pages = self.dirtied(duration, convergence.stun_target(Some(self.wire)));
            remaining = dirtied_pages * PAGE_SIZE;
            let iteration = Iteration { number, duration, dirtied_pages, remaining_bytes: remaining };
            let verdict = convergence.after_iteration(&iteration, &now, &predictor);
            match verdict.decision {
                Decision::Continue => {}
                Decision::Stun { pages_per_second, .. } => stuns.push((number, pages_per_second)),
                _ => return End { verdict, iterations: number, stuns, bytes_sent },
            }
        }
        unreachable!("iterations are limited")
    }

    /// Distinct pages among random writes, or what is let through of them.
    fn dirtied(&self, duration: Duration, target: Option<u64>) -> u64 {
        let pages = (self.working_set / PAGE_SIZE) as f64;
        let writes = self.writes / PAGE_SIZE as f64 * duration.as_secs_f64();
        let dirtied = (pages * (1.0 - (-writes / pages).exp())) as u64;
        let released =
            target.filter(|_| self.obeys).map(|target| (target as f64 * duration.as_secs_f64()) as u64);
        dirtied.min(released.unwrap_or(u64::MAX))
    }
}

fn policy(converge: Converge) -> Policy {
    Policy { converge, ..Policy::default() }
}

fn why(verdict: &Verdict) -> Why {
    match verdict.decision {
        Decision::Stun { why, .. } | Decision::Postcopy { why } | Decision::GiveUp { why } => why,
        other => panic!("{other:?} needs no reason"),
    }
}

#[test]
fn a_stun_makes_it_fit() {
    let end = FLAT_OUT.run(policy(Converge::Stun));
    assert_eq!(end.verdict.decision, Decision::SwitchOver);
    assert_eq!(end.stuns.len(), 1, "{:?}", end.stuns);
    let (iteration, target) = end.stuns[0];
    assert!(iteration <= 2, "it is clear early");
    let wire = FLAT_OUT.wire as u64 / PAGE_SIZE;
    assert!((wire * 45 / 100..=wire / 2).contains(&target), "{target} of {wire}");
    assert!(end.iterations <= 12, "{} iterations, each half of the one before", end.iterations);
    assert!(end.bytes_sent < 3 * GIB);
    let stun = end.verdict.figures.stun.expect("it was stunned to the end");
    assert_eq!(stun.pages_per_second(), target);
}

#[test]
fn what_converges_by_itself_is_not_slowed() {
    for writes in [50e6, 100e6, 150e6] {
        let guest = Setting { writes, working_set: FLAT_OUT.ram, ..FLAT_OUT };
        for converge in [Converge::Stun, Converge::Postcopy, Converge::Auto] {
            let end = guest.run(policy(converge));
            assert_eq!(end.verdict.decision, Decision::SwitchOver);
            assert_eq!(end.stuns, [], "{writes} bytes/s");
        }
    }
}

#[test]
fn postcopy_begins_as_soon_as_it_is_clear() {
    let everywhere = Setting { working_set: FLAT_OUT.ram, ..FLAT_OUT };
    for (guest, reason, iterations) in
        [(everywhere, Reason::Outrun, 1), (FLAT_OUT, Reason::StoppedShrinking, 2)]
    {
        let end = guest.run(policy(Converge::Postcopy));
        let why = why(&end.verdict);
        assert!(matches!(end.verdict.decision, Decision::Postcopy { .. }));
        assert_eq!((why.reason, end.iterations, end.stuns.len()), (reason, iterations, 0));
        assert_eq!(end.verdict.forecast.transfer, Duration::ZERO, "the forecast is for post-copy");
        assert!(why.figures.downtime > 1000 * MS, "the reason is for a switchover");
    }
}

#[test]
fn a_iteration_that_grew_because_of_the_wire_is_not_held_against_the_guest() {
    for converge in [Converge::Stun, Converge::Postcopy, Converge::Auto] {
        let mut convergence = Convergence::new(policy(converge));
        for (number, remaining_mib, seconds) in [(1, 400, 4), (2, 200, 4), (3, 300, 12), (4, 180, 7)] {
            let iteration = Iteration {
                number,
                duration: Duration::from_secs(seconds),
                dirtied_pages: remaining_mib * MIB / PAGE_SIZE,
                remaining_bytes: remaining_mib * MIB,
            };
            let wire = if number < 3 { 250e6 } else { 80e6 };
            let verdict = convergence.after_iteration(&iteration, &conditions(wire), &Predictor::new());
            assert_eq!(verdict.decision, Decision::Continue, "iteration {number}");
        }
    }
}

#[test]
fn a_bound_that_is_in_the_way_is_named() {
    let end = FLAT_OUT.run(Policy { max_stun_percent: 20, ..policy(Converge::Stun) });
    let why = why(&end.verdict);
    assert!(matches!(end.verdict.decision, Decision::GiveUp { .. }));
    assert_eq!((why.reason, end.stuns.len()), (Reason::StunTooWeak, 0));
    let needed = why.figures.stun.expect("how far it would have to be slowed").percent();
    let text = why.to_string();
    assert!(text.contains(&format!("lose {needed} % of its writes, and may lose 20 %")), "{text}");
    assert!(text.contains(&format!("--max-stun to {needed}")) && text.contains("--converge auto"), "{text}");

    // And what it says helps.
    let helped = FLAT_OUT.run(Policy { max_stun_percent: needed, ..policy(Converge::Stun) });
    assert_eq!(helped.verdict.decision, Decision::SwitchOver);
    assert!(!helped.stuns.is_empty());
}

#[test]
fn auto_goes_on_with_postcopy_where_the_bound_is_in_the_way() {
    let end = FLAT_OUT.run(Policy { max_stun_percent: 20, ..policy(Converge::Auto) });
    assert!(matches!(end.verdict.decision, Decision::Postcopy { .. }));
    assert_eq!((why(&end.verdict).reason, end.stuns.len()), (Reason::StunTooWeak, 0));
    let within = FLAT_OUT.run(policy(Converge::Auto));
    assert_eq!((within.verdict.decision, within.stuns.len()), (Decision::SwitchOver, 1));
}

#[test]
fn a_guest_that_does_not_get_slower_is_slowed_further_and_then_dealt_with() {
    let stubborn = Setting { obeys: false, ..FLAT_OUT };
    let auto = stubborn.run(policy(Converge::Auto));
    assert!(matches!(auto.verdict.decision, Decision::Postcopy { .. }));
    assert_eq!(why(&auto.verdict).reason, Reason::StunTooWeak);
    let targets: Vec<_> = auto.stuns.iter().map(|&(_, target)| target).collect();
    assert!(
        matches!(targets[..], [a, b, c] if a / 2 == b && b / 2 == c),
        "each is half of the one before: {targets:?}"
    );

    let bounded = stubborn.run(Policy { max_stun_percent: 80, ..policy(Converge::Stun) });
    assert!(matches!(bounded.verdict.decision, Decision::GiveUp { .. }));
    let why = why(&bounded.verdict);
    assert_eq!(why.reason, Reason::StunTooWeak);
    let floor = why.figures.stun.expect("it was stunned").floor as u64 / PAGE_SIZE;
    assert!(bounded.stuns.iter().all(|&(_, target)| target >= floor), "{:?} and {floor}", bounded.stuns);
}

#[test]
fn long_iterations_need_a_stronger_stun() {
    // Half of what the wire carries in a second never fits into 300 ms.
    let slow = Setting { overhead: Duration::from_secs(1), ..FLAT_OUT };
    let end = slow.run(policy(Converge::Stun));
    assert_eq!(end.verdict.decision, Decision::SwitchOver);
    assert!(end.stuns.len() > 1, "{:?}", end.stuns);
    assert!(end.iterations <= 15, "{} iterations", end.iterations);
}

#[test]
fn hot_pages_that_do_not_fit_the_limit_are_slowed_after_the_second_iteration() {
    let hot = Setting { working_set: 64 * MIB, wire: 1e9, ..FLAT_OUT };
    let policy = Policy { downtime_limit: 70 * MS, ..policy(Converge::Stun) };
    let end = hot.run(policy);
    assert_eq!(end.verdict.decision, Decision::SwitchOver);
    assert!(matches!(end.stuns[..], [(2, _)]), "{:?}", end.stuns);
    assert!(end.verdict.forecast.with_margin() <= policy.downtime_limit);
}

#[test]
fn iterations_that_shrink_too_slowly_are_helped_in_time() {
    let slow = Setting { ram: 16 * GIB, working_set: 16 * GIB, writes: 0.85 * 250e6, ..FLAT_OUT };
    let policy = Policy { max_iterations: 12, ..policy(Converge::Stun) };
    assert!(matches!(
        slow.run(Policy { converge: Converge::None, ..policy }).verdict.decision,
        Decision::GiveUp { why: Why { reason: Reason::TooManyIterations, .. } }
    ));
    let end = slow.run(policy);
    assert_eq!(end.verdict.decision, Decision::SwitchOver);
    assert!(matches!(end.stuns[..], [(6, _)]), "{:?}", end.stuns);
}

#[test]
fn iterations_are_bounded_under_stun_too() {
    for (converge, max_iterations) in [Converge::Stun, Converge::Auto].into_iter().zip([1, 3]) {
        let end = FLAT_OUT.run(Policy { max_iterations, ..policy(converge) });
        assert_eq!((why(&end.verdict).reason, end.iterations), (Reason::TooManyIterations, max_iterations));
        let postcopy = matches!(end.verdict.decision, Decision::Postcopy { .. });
        assert_eq!(postcopy, converge == Converge::Auto);
    }
}

#[test]
fn a_target_follows_the_wire_and_keeps_to_the_bound() {
    let mut convergence = Convergence::new(Policy { max_stun_percent: 90, ..policy(Converge::Stun) });
    assert_eq!(convergence.stun_target(Some(1e9)), None);
    let dirtied_pages = 100_000;
    let iteration = Iteration {
        number: 1,
        duration: Duration::from_secs(1),
        dirtied_pages,
        remaining_bytes: dirtied_pages * PAGE_SIZE,
    };
    let wire = 200e6;
    let verdict = convergence.after_iteration(&iteration, &conditions(wire), &Predictor::new());
    let half = (wire / 2.0 / PAGE_SIZE as f64) as u64;
    assert!(matches!(verdict.decision, Decision::Stun { pages_per_second, .. } if pages_per_second == half));
    assert_eq!(convergence.stun_target(Some(2.0 * wire)), Some(2 * half));
    for poor in [Some(1e6), Some(0.0), Some(f64::NAN), None] {
        assert_eq!(convergence.stun_target(poor), Some(10_000), "a tenth of what it wrote");
    }
}

#[test]
fn postcopy_can_be_ordered() {
    let now = Policy { postcopy: Some(Postcopy::Now), ..Policy::default() };
    let hybrid = Policy { postcopy: Some(Postcopy::Hybrid), ..Policy::default() };
    let idle = Setting { writes: 0.0, ..FLAT_OUT };
    for (guest, policy, iterations) in [(FLAT_OUT, now, 0), (FLAT_OUT, hybrid, 1), (idle, hybrid, 1)] {
        let end = guest.run(policy);
        assert!(matches!(end.verdict.decision, Decision::Postcopy { .. }));
        assert_eq!((why(&end.verdict).reason, end.iterations), (Reason::Ordered, iterations));
        assert!(end.verdict.forecast.with_margin() <= policy.downtime_limit);

        let too_short = guest.run(Policy { downtime_limit: 10 * MS, ..policy });
        assert!(matches!(too_short.verdict.decision, Decision::GiveUp { .. }));
        assert_eq!(super::outrun::why(&too_short.verdict).reason, Reason::LimitTooShort);
    }
}

#[test]
fn decisions_are_told_with_their_figures() {
    let figures = Figures {
        iteration: 2,
        dirty_bytes_per_second: 812e6,
        bandwidth: Some(250e6),
        remaining_bytes: 310_000_000,
        downtime: Duration::from_micros(1_300_100),
        downtime_limit: 300 * MS,
        stun: Some(Slowdown { unstunned: 812e6, target: 125e6, floor: 8.12e6, max_percent: 99 }),
    };
    let (forecast, forecast_after_another) = {
        let forecast = Predictor::new().forecast(2_000_000, &conditions(250e6));
        (forecast, forecast)
    };
    let says = |decision| Verdict { decision, figures, forecast, forecast_after_another }.to_string();
    let why = |reason| Why { reason, figures };
    let found = "it dirties 812.0 MB/s (6.50 Gbit/s) and the ports deliver 250.0 MB/s (2.00 Gbit/s); with \
                 310.0 MB left the pause would take 1301 ms, and the limit is 300 ms";
    assert_eq!(says(Decision::Continue), format!("copies another round: {found}"));
    assert_eq!(
        says(Decision::Stun { pages_per_second: 30_500, why: why(Reason::Outrun) }),
        format!("slows the guest's writes to 30,500 pages/s (85 % less): {found}")
    );
    assert_eq!(
        says(Decision::SwitchOver),
        "switches over: with 310.0 MB left the pause should take 21 ms, 1301 ms at most, and the limit is 300 ms"
    );
    assert_eq!(
        says(Decision::Postcopy { why: why(Reason::StoppedShrinking) }),
        format!(
            "lets the guest run at the destination with 310.0 MB still to come: rounds have stopped shrinking \
             (round 2): {found}"
        )
    );
    assert_eq!(
        says(Decision::GiveUp { why: why(Reason::StunTooWeak) }),
        format!(
            "leaves the guest where it is: it would have to lose 85 % of its writes, and may lose 99 % (round 2): \
             {found}: allow post-copy (--converge auto), raise the downtime limit, add ports, or try when the guest \
             writes less"
        )
    );
}

prop_compose! {
    fn outrunning()(
        ram_mib in 64..8192u64,
        wire in 20e6..5e9f64,
        times in 1.0..100.0f64,
        share in 0.3..1.0f64,
        overhead in 0..100u32,
    ) -> Setting {
        Setting {
            ram: ram_mib * MIB,
            working_set: (ram_mib as f64 * share) as u64 * MIB,
            writes: wire * times,
            wire,
            overhead: overhead * MS,
            obeys: true,
        }
    }
}

proptest! {
    #[test]
    fn a_stun_always_suffices_if_the_order_lets_it(guest in outrunning(), limit in 60..1000u32) {
        let end = guest.run(Policy { downtime_limit: limit * MS, ..policy(Converge::Stun) });
        prop_assert_eq!(end.verdict.decision, Decision::SwitchOver);
        prop_assert!(end.verdict.forecast.with_margin() <= limit * MS);
        // It is clear early, unless iterations are hardly spent in sending.
        let sending = Duration::from_secs_f64(guest.working_set as f64 / guest.wire);
        if guest.writes > guest.wire * 3.0 && sending > guest.overhead * 2 {
            prop_assert!(end.stuns.first().is_none_or(|&(iteration, _)| iteration <= 2), "{:?}", end.stuns);
        }
    }

    #[test]
    fn auto_always_moves_the_guest(guest in outrunning(), obeys in any::<bool>(), max_stun_percent in 0..=99u8) {
        let policy = Policy { max_stun_percent, ..policy(Converge::Auto) };
        let end = Setting { obeys, ..guest }.run(policy);
        let gave_up = matches!(end.verdict.decision, Decision::GiveUp { .. });
        prop_assert!(!gave_up, "{end:?}");
        prop_assert!(end.verdict.forecast.with_margin() <= policy.downtime_limit);
    }

    #[test]
    fn no_guest_is_slowed_beyond_the_bound(guest in outrunning(), obeys in any::<bool>(), max_stun_percent in 0..=99u8) {
        let policy = Policy { max_stun_percent, ..policy(Converge::Stun) };
        let end = Setting { obeys, ..guest }.run(policy);
        prop_assert!(end.iterations <= policy.max_iterations);
        if let Some(stun) = end.verdict.figures.stun {
            let floor = stun.unstunned * (100.0 - f64::from(max_stun_percent)) / 100.0 / PAGE_SIZE as f64;
            prop_assert!(end.stuns.iter().all(|&(_, target)| (target + 1) as f64 >= floor));
        }
    }
}
