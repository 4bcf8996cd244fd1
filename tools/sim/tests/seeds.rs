//! Some thousand seeds, in which nothing must be violated.

use memlane_sim::{Plant, Tally, simulate};

/// So many seeds are run.
const SEEDS: u64 = 5000;
/// A violation names its seed, and the test goes on to find more, up to this many.
const MOST: usize = 5;

#[test]
fn no_seed_violates_anything() {
    let (mut tally, mut violations) = (Tally::default(), Vec::new());
    for seed in 0..SEEDS {
        let run = simulate(seed, Plant::Nothing, false);
        tally += &run.tally;
        if let Some(violation) = run.violation {
            violations
                .push(format!("seed {seed}: {violation}; cargo xtask simulate --seed {seed} --verbose"));
        }
        if violations.len() == MOST {
            break;
        }
    }
    println!("{tally}");
    assert!(violations.is_empty(), "{}", violations.join("\n"));
    // Runs that meet nothing would find nothing.
    let met = [
        ("completed", tally.completed),
        ("kept", tally.kept),
        ("taken back", tally.taken_back),
        ("lost", tally.lost),
        ("stunned", tally.stunned),
        ("post-copies", tally.postcopies),
        ("last moves", tally.encores),
        ("lanes lost", tally.lanes_lost),
        ("crashes", tally.crashes),
        ("recovered", tally.recovered),
        ("other connections", tally.resumed),
        ("fetched by another daemon", tally.reopened),
    ];
    for (what, count) in met {
        assert!(count >= SEEDS / 250, "{what}: only {count} times in {SEEDS} seeds");
    }
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in [1, 77, 1234, u64::MAX] {
        let run = simulate(seed, Plant::Nothing, true);
        assert!(run.trace.len() > 20, "seed {seed} has a trace");
        assert_eq!(run, simulate(seed, Plant::Nothing, true), "seed {seed}");
        let silent = simulate(seed, Plant::Nothing, false);
        assert_eq!(
            (run.violation, run.tally),
            (silent.violation, silent.tally),
            "seed {seed} without its trace"
        );
    }
}
