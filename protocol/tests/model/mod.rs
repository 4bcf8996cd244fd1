//! The checker: breadth-first over every reachable state, then backwards from the good ends.

use std::collections::HashMap;
use std::fmt;
use std::hash::BuildHasherDefault;
use std::rc::Rc;

pub(crate) mod world;

use world::{Step, World};

/// What a check that found nothing wrong went through.
#[derive(Debug)]
pub(crate) struct Explored {
    pub states: usize,
    pub steps: usize,
    /// Good ends: everything at rest, and the guest running at this host,
    pub ran_at_source: usize,
    pub ran_at_destination: usize,
    /// or at none, as its VMM ended while it had the guest, or in post-copy what it needs.
    pub ran_nowhere: usize,
}

/// What is wrong, and the shortest way there.
#[derive(Debug)]
pub(crate) struct Violation {
    what: String,
    stuck: bool,
    trace: Vec<Step>,
    end: World,
}

impl Violation {
    /// Two owners, or one that should not be.
    pub(crate) fn is_unsafe(&self) -> bool {
        !self.stuck
    }

    /// A state from which no good end can be reached, even if nothing fails any more.
    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck
    }
}

impl fmt::Display for Explored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, steps, ran_at_source, ran_at_destination, ran_nowhere } = self;
        write!(
            f,
            "{states} states, {steps} steps between them; \
             good ends: {ran_at_source} at the source, {ran_at_destination} at the destination, \
             {ran_nowhere} nowhere"
        )
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} after:", self.what)?;
        for step in &self.trace {
            writeln!(f, "  {step:?}")?;
        }
        write!(f, "{:#?}", self.end)
    }
}

/// Explores everything that can follow from `start`.
pub(crate) fn check(start: World) -> Result<Explored, Box<Violation>> {
    let mut known: HashMap<Rc<World>, u32, BuildHasherDefault<Fold>> = HashMap::default();
    let mut worlds = vec![Rc::new(start)];
    known.insert(worlds[0].clone(), 0);
    // How each state was first reached, and every step that needs no further trouble.
    let mut origins: Vec<Option<(u32, Step)>> = vec![None];
    let mut fair: Vec<(u32, u32)> = Vec::new();
    let mut steps = 0;

    let mut next = 0;
    while let Some(world) = worlds.get(next).cloned() {
        if let Some(what) = world.violation() {
            return Err(report(what, false, next, &worlds, &origins));
        }
        for (step, after) in world.steps() {
            steps += 1;
            let fresh = worlds.len() as u32;
            let after = Rc::new(after);
            let index = *known.entry(after.clone()).or_insert(fresh);
            if index == fresh {
                worlds.push(after);
                origins.push(Some((next as u32, step)));
            }
            if step.is_fair() && index != next as u32 {
                fair.push((index, next as u32));
            }
        }
        next += 1;
    }

    let good: Vec<_> = worlds.iter().map(|world| world.good_end()).collect();
    let ends: Vec<u32> = (0..).zip(&good).filter_map(|(index, end)| end.map(|_| index)).collect();
    let hopeful = reach_backwards(worlds.len(), &ends, fair);
    if let Some(stuck) = hopeful.iter().position(|hopeful| !hopeful) {
        let what = "no good end can be reached any more".to_owned();
        return Err(report(what, true, stuck, &worlds, &origins));
    }
    let count = |host| good.iter().filter(|end| **end == Some(host)).count();
    Ok(Explored {
        states: worlds.len(),
        steps,
        ran_at_source: count(Some(world::Side::Source)),
        ran_at_destination: count(Some(world::Side::Destination)),
        ran_nowhere: count(None),
    })
}

/// Which of `states` states lead to one of `ends`, given `edges` as (to, from).
fn reach_backwards(states: usize, ends: &[u32], mut edges: Vec<(u32, u32)>) -> Vec<bool> {
    edges.sort_unstable();
    let mut reached = vec![false; states];
    let mut pending = ends.to_vec();
    while let Some(state) = pending.pop() {
        if std::mem::replace(&mut reached[state as usize], true) {
            continue;
        }
        let first = edges.partition_point(|&(to, _)| to < state);
        let into = edges[first..].iter().take_while(|&&(to, _)| to == state);
        pending.extend(into.map(|&(_, from)| from).filter(|&from| !reached[from as usize]));
    }
    reached
}

fn report(
    what: String,
    stuck: bool,
    index: usize,
    worlds: &[Rc<World>],
    origins: &[Option<(u32, Step)>],
) -> Box<Violation> {
    let mut trace = Vec::new();
    let mut at = index;
    while let Some((before, step)) = origins[at] {
        trace.push(step);
        at = before as usize;
    }
    trace.reverse();
    Box::new(Violation { what, stuck, trace, end: (*worlds[index]).clone() })
}

/// A hasher for many small keys of our own making, where the default one would take half the
/// time of a check.
#[derive(Default)]
struct Fold(u64);

impl std::hash::Hasher for Fold {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
}
