//! What the guest does, as a model: the pages that it writes, in which order, with which values.
//!
//! Everything here depends on the parameters and on the number of steps alone, never on time.
//! The guest code does the same steps in assembler; where the two differ, this is the truth.

mod fill;
mod random;
mod stepper;

use std::str::FromStr;
use std::time::Duration;

use random::mix;

pub use fill::Fill;
pub use stepper::{READ_FACTOR, SLOTS, Step, Stepper};

/// The default time between two wake-ups of a guest.
pub const TICK: Duration = Duration::from_millis(1);

/// The work that a guest is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The seed that makes one run like another.
    pub seed: u64,
    /// The order in which pages are written.
    pub pattern: Pattern,
    /// The rate at which pages are written.
    pub rate: WriteRate,
    /// The time from one wake-up to the next of a guest that does not write as fast as it can.
    pub tick: Duration,
    /// The number of pages that are written, divided among the vCPUs that write.
    pub working_set_pages: u64,
    /// The number of vCPUs that only read and compute. They are the last ones.
    pub readers: u16,
    /// The contents of all pages before the first step.
    pub fill: Fill,
}

/// The choice of the next page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Each page is as likely as any other.
    Uniform,
    /// The pages come one after the other, round and round.
    Sequential,
    /// Nine steps of ten go to a tenth of the pages.
    HotCold,
}

/// The number of pages that the whole guest writes in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteRate {
    /// The guest writes as many as it can.
    FlatOut,
    /// The guest writes this many; none if 0.
    PagesPerSecond(u64),
}

impl Workload {
    /// Returns the number of pages of the working set that each of `writers` vCPUs has to itself.
    pub fn pages_each(&self, writers: u16) -> u64 {
        self.working_set_pages / u64::from(writers)
    }

    /// Returns the steps of a vCPU, one of `writers`, from the beginning.
    pub fn stepper(&self, vcpu: u16, writers: u16) -> Stepper {
        let pages = self.pages_each(writers);
        let (hot_pages, hot_chance) = match self.pattern {
            Pattern::HotCold if pages >= 2 => ((pages / 10).max(1), (1 << 16) * 9 / 10),
            _ => (0, 0),
        };
        let sequential = self.pattern == Pattern::Sequential;
        Stepper { pages, hot_pages, hot_chance, sequential, ..self.reader(vcpu) }
    }

    /// Returns the steps of a vCPU that only reads. Each step is a page of the whole working set, any as likely as any
    /// other, which is read from end to end. Its slot and its value mean nothing.
    pub fn reader(&self, vcpu: u16) -> Stepper {
        Stepper {
            // Never 0, where xorshift would stay.
            random: mix(self.seed ^ mix(u64::from(vcpu) + 1)) | 1,
            done: 0,
            cursor: 0,
            pages: self.working_set_pages,
            hot_pages: 0,
            hot_chance: 0,
            sequential: false,
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "uniform" => Ok(Self::Uniform),
            "sequential" => Ok(Self::Sequential),
            "hot-cold" => Ok(Self::HotCold),
            _ => Err("patterns are uniform, sequential and hot-cold".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(pattern: Pattern) -> Workload {
        let fill = Fill { zero: 50, random: 30, compressible: 20, mixed: 0 };
        Workload {
            seed: 1,
            pattern,
            rate: WriteRate::FlatOut,
            tick: TICK,
            working_set_pages: 1000,
            readers: 0,
            fill,
        }
    }

    #[test]
    fn every_pattern_stays_within_its_part_and_reaches_it_all() {
        for pattern in [Pattern::Uniform, Pattern::Sequential, Pattern::HotCold] {
            let mut stepper = workload(pattern).stepper(1, 4);
            let mut hits = vec![0u32; 250];
            for _ in 0..100_000 {
                let step = stepper.next();
                assert!(step.slot < SLOTS);
                hits[step.page as usize] += 1;
            }
            assert!(hits.iter().all(|hits| *hits > 0), "{pattern:?}");
            let hot: u32 = hits[..25].iter().sum();
            match pattern {
                Pattern::HotCold => assert!((88_000..92_000).contains(&hot), "{hot}"),
                _ => assert!((9_000..11_000).contains(&hot), "{hot}"),
            }
        }
    }

    #[test]
    fn readers_reach_the_whole_working_set_whatever_the_pattern() {
        for pattern in [Pattern::Uniform, Pattern::Sequential, Pattern::HotCold] {
            let mut reader = workload(pattern).reader(3);
            let mut hits = vec![0u32; 1000];
            (0..100_000).for_each(|_| hits[reader.next().page as usize] += 1);
            assert!(hits.iter().all(|hits| (20..200).contains(hits)), "{pattern:?}");
        }
    }

    #[test]
    fn a_stepper_goes_on_from_its_position() {
        for pattern in [Pattern::Uniform, Pattern::Sequential, Pattern::HotCold] {
            let fresh = workload(pattern).stepper(0, 1);
            let mut stepper = fresh.clone();
            for _ in 0..1234 {
                stepper.next();
            }
            let mut resumed = fresh.at(stepper.position()).unwrap();
            assert_eq!(resumed.next(), stepper.next());
        }
        assert_eq!(workload(Pattern::Uniform).stepper(0, 1).at([0, 5]), None);
    }

    #[test]
    fn steps_can_be_skipped_and_undone() {
        for pattern in [Pattern::Uniform, Pattern::Sequential, Pattern::HotCold] {
            let fresh = workload(pattern).stepper(0, 3);
            let mut stepper = fresh.clone();
            let steps: Vec<Step> = (0..5000).map(|_| stepper.next()).collect();
            assert_eq!(fresh.jump_to(5000), stepper);
            assert_eq!(fresh.jump_to(1234).jump_to(5000), stepper);
            for step in steps.iter().rev() {
                assert_eq!(stepper.back(), *step);
            }
            assert_eq!(stepper, fresh);
        }
    }

    #[test]
    fn vcpus_and_seeds_differ() {
        let one = workload(Pattern::Uniform);
        let two = Workload { seed: 2, ..one.clone() };
        assert_ne!(one.stepper(0, 2).next(), one.stepper(1, 2).next());
        assert_ne!(one.stepper(0, 2).next(), two.stepper(0, 2).next());
    }
}
