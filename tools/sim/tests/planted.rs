//! The simulation is worth something only if it finds what is wrong.

use memlane_sim::{Plant, simulate};

/// Within so many seeds.
const SEEDS: u64 = 5000;

#[test]
fn planted_faults_are_found() {
    let mut missed = Vec::new();
    for plant in Plant::ALL {
        let found = (0..SEEDS).find_map(|seed| Some((seed, simulate(seed, plant, false).violation?)));
        match found {
            Some((seed, violation)) => println!("{plant:?}: after {} seeds: {violation}", seed + 1),
            None => missed.push(plant),
        }
    }
    assert!(missed.is_empty(), "{missed:?} are not found within {SEEDS} seeds");
}
