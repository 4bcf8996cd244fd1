//! What the guest does, as a model: the pages that it writes, in which order, with which values.
//!
//! Everything here depends on the parameters and on the number of steps alone, never on time.
//! The guest code does the same steps in assembler; where the two differ, this is the truth.

use std::str::FromStr;
use std::time::Duration;

/// 8-byte slots in a page.
pub const SLOTS: usize = 512;
/// A reader computes `sum = (sum ^ slot) * READ_FACTOR` over all slots of a page. It is odd, so that nothing is lost.
pub const READ_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// How often guests wake up, if nothing else is said.
pub const TICK: Duration = Duration::from_millis(1);

/// What a guest is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Makes one run like another.
    pub seed: u64,
    /// Which pages are written.
    pub pattern: Pattern,
    /// How fast.
    pub rate: Rate,
    /// How often a guest wakes up to write that is not flat out: the time from one wake-up to the next.
    pub tick: Duration,
    /// Pages that are written, shared out among the vCPUs that write.
    pub working_set_pages: u64,
    /// How many of the vCPUs, the last ones, only read and compute.
    pub readers: u16,
    /// What all pages hold before the first step.
    pub fill: Fill,
}

/// How the next page is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Any page as likely as any other.
    Uniform,
    /// One page after the other, round and round.
    Sequential,
    /// Nine steps of ten in a tenth of the pages.
    HotCold,
}

/// How many pages the whole guest writes in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// As many as it can.
    FlatOut,
    /// This many; none for an idle guest.
    PagesPerSecond(u64),
}

/// Which part of the pages starts how, in percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Pages that are holes.
    pub zero: u8,
    /// Pages of random bytes, which cannot be compressed.
    pub random: u8,
    /// Pages that a compressor makes small.
    pub compressible: u8,
    /// Pages that LZ4 makes a third of.
    pub mixed: u8,
}

/// One write of 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Page within the vCPU's part of the working set.
    pub page: u64,
    /// Slot in the page.
    pub slot: usize,
    /// What is written.
    pub value: u64,
}

/// The steps of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stepper {
    random: u64,
    done: u64,
    cursor: u64,
    pages: u64,
    hot_pages: u64,
    /// A step goes to a hot page if 16 random bits are below this.
    hot_chance: u64,
    sequential: bool,
}

impl Workload {
    /// Pages of the working set that each of `writers` vCPUs has to itself.
    pub fn pages_each(&self, writers: u16) -> u64 {
        self.working_set_pages / u64::from(writers)
    }

    /// The steps of a vCPU, one of `writers`, from the beginning.
    pub fn stepper(&self, vcpu: u16, writers: u16) -> Stepper {
        let pages = self.pages_each(writers);
        let (hot_pages, hot_chance) = match self.pattern {
            Pattern::HotCold if pages >= 2 => ((pages / 10).max(1), (1 << 16) * 9 / 10),
            _ => (0, 0),
        };
        let sequential = self.pattern == Pattern::Sequential;
        Stepper { pages, hot_pages, hot_chance, sequential, ..self.reader(vcpu) }
    }

    /// The steps of a vCPU that only reads: each is a page of the whole working set, any as likely as any other,
    /// which is read from end to end. What it says of slot and value means nothing.
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

impl Stepper {
    /// A stepper as it was when [`Stepper::position`] told this; `None` if it cannot have been.
    pub fn at(&self, [random, done]: [u64; 2]) -> Option<Self> {
        let cursor = if self.pages == 0 { 0 } else { done % self.pages };
        (random != 0).then_some(Self { random, done, cursor, ..self.clone() })
    }

    /// State of the generator and number of steps done.
    pub fn position(&self) -> [u64; 2] {
        [self.random, self.done]
    }

    /// A stepper as it will be when `done` steps are done, without doing them.
    pub fn jump_to(&self, done: u64) -> Self {
        // One step of the generator is a linear map over GF(2); its powers take few products.
        let mut power = Linear::of(step);
        let mut random = self.random;
        let mut left = done.wrapping_sub(self.done);
        while left != 0 {
            if left & 1 == 1 {
                random = power.apply(random);
            }
            left >>= 1;
            power = power.squared();
        }
        let cursor = if self.pages == 0 { 0 } else { done % self.pages };
        Self { random, done, cursor, ..self.clone() }
    }

    /// Undoes the last step, and tells what it was. There must be one.
    pub fn back(&mut self) -> Step {
        let value = self.random;
        self.cursor = if self.cursor == 0 { self.pages - 1 } else { self.cursor - 1 };
        self.done -= 1;
        let step = self.place(value);
        self.random = step_back(value);
        step
    }

    /// Number of steps done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Pages that steps may go to.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that are hot, from the first, and how likely they are in 65,536ths.
    pub fn hot(&self) -> (u64, u64) {
        (self.hot_pages, self.hot_chance)
    }

    /// Whether pages are written in order.
    pub fn is_sequential(&self) -> bool {
        self.sequential
    }

    /// Does the next step.
    #[expect(clippy::should_implement_trait, reason = "steps never end, so there is no Option")]
    pub fn next(&mut self) -> Step {
        self.random = step(self.random);
        let place = self.place(self.random);
        self.cursor = if self.cursor + 1 == self.pages { 0 } else { self.cursor + 1 };
        self.done += 1;
        place
    }

    /// Where a value goes, with the cursor as it is before the step.
    fn place(&self, value: u64) -> Step {
        let upper = value >> 32;
        let page = if self.sequential {
            self.cursor
        } else if value >> 16 & 0xffff < self.hot_chance {
            (upper * self.hot_pages) >> 32
        } else {
            self.hot_pages + ((upper * (self.pages - self.hot_pages)) >> 32)
        };
        Step { page, slot: (value & (SLOTS as u64 - 1)) as usize, value }
    }
}

/// xorshift64 (Marsaglia, "Xorshift RNGs", 2003).
fn step(mut random: u64) -> u64 {
    random ^= random << 13;
    random ^= random >> 7;
    random ^ random << 17
}

/// The inverse of [`step`]: shifts are undone from the last to the first, each by doubling.
fn step_back(mut random: u64) -> u64 {
    for shift in [17, 34] {
        random ^= random << shift;
    }
    for shift in [7, 14, 28, 56] {
        random ^= random >> shift;
    }
    for shift in [13, 26, 52] {
        random ^= random << shift;
    }
    random
}

/// A linear map of 64 bits: what it makes of each.
struct Linear([u64; 64]);

impl Linear {
    fn of(map: fn(u64) -> u64) -> Self {
        Self(std::array::from_fn(|bit| map(1 << bit)))
    }

    fn apply(&self, value: u64) -> u64 {
        let image = |bit: usize| if value >> bit & 1 == 1 { self.0[bit] } else { 0 };
        (0..64).map(image).fold(0, std::ops::BitXor::bitxor)
    }

    fn squared(&self) -> Self {
        Self(std::array::from_fn(|bit| self.apply(self.0[bit])))
    }
}

impl Fill {
    /// Whether a page starts with zeros.
    pub fn is_zero(&self, seed: u64, page: u64) -> bool {
        self.draw(seed, page) < u64::from(self.zero)
    }

    /// Writes what a page starts with.
    pub fn write(&self, seed: u64, page: u64, into: &mut [u64; SLOTS]) {
        let mut random = mix(seed ^ mix(!page)) | 1;
        let draw = self.draw(seed, page);
        let mut next = || {
            random = step(random);
            random
        };
        let (zero, random) = (u64::from(self.zero), u64::from(self.random));
        if draw < zero {
            into.fill(0);
        } else if draw < zero + random {
            into.fill_with(next);
        } else if draw < zero + random + u64::from(self.mixed) {
            // Like records: 14 bytes of each are its own, and the others those of the one before.
            for slots in into.chunks_mut(8) {
                let (short, long) = (next() >> 16, next());
                slots.copy_from_slice(&[short, page, 0, 0x2020_2020_2020_2020, page, long, seed, page]);
            }
        } else {
            let random = next();
            // Like a table: one line over and over, with a counter in it.
            for (line, slots) in into.chunks_mut(8).enumerate() {
                slots.copy_from_slice(&[random, page, line as u64, 0, 0, 0, 0x2020_2020_2020_2020, random]);
            }
        }
    }

    /// Neighbours mostly start alike, as in the memory of real guests; one area in eight is a
    /// patchwork of single pages.
    fn draw(&self, seed: u64, page: u64) -> u64 {
        const AREA_PAGES: u64 = 64;
        let area = mix(seed.wrapping_add(mix(!(page / AREA_PAGES))));
        match area % 8 {
            0 => mix(seed.wrapping_add(mix(page))) % 100,
            _ => (area >> 32) % 100,
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

impl FromStr for Fill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut fill = Self { zero: 0, random: 0, compressible: 0, mixed: 0 };
        for share in text.split(',') {
            let parsed = share.split_once('=').and_then(|(name, value)| {
                let percent = value.parse::<u8>().ok().filter(|percent| *percent <= 100)?;
                match name {
                    "zero" => fill.zero = percent,
                    "random" => fill.random = percent,
                    "compressible" => fill.compressible = percent,
                    "mixed" => fill.mixed = percent,
                    _ => return None,
                }
                Some(())
            });
            if parsed.is_none() {
                return Err(format!("{share:?} is no share; write zero=50,random=30,compressible=20"));
            }
        }
        match [fill.zero, fill.random, fill.compressible, fill.mixed].into_iter().map(u32::from).sum::<u32>()
        {
            100 => Ok(fill),
            sum => Err(format!("the shares add up to {sum} percent, and must make 100")),
        }
    }
}

/// The finalizer of SplitMix64: spreads whatever structure its input has.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(pattern: Pattern) -> Workload {
        let fill = Fill { zero: 50, random: 30, compressible: 20, mixed: 0 };
        Workload {
            seed: 1,
            pattern,
            rate: Rate::FlatOut,
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

    #[test]
    fn pages_start_as_the_shares_say() {
        let fill = workload(Pattern::Uniform).fill;
        let mut page = [0; SLOTS];
        let (mut zero, mut random) = (0, 0);
        for number in 0..100_000 {
            fill.write(7, number, &mut page);
            assert_eq!(fill.is_zero(7, number), page == [0; SLOTS]);
            zero += u32::from(page == [0; SLOTS]);
            random += u32::from(page[..8] != page[8..16] && page[3] != 0);
        }
        assert!((46_000..54_000).contains(&zero), "{zero}");
        assert!((26_000..34_000).contains(&random), "{random}");
    }

    #[test]
    fn records_have_fields_of_their_own_and_others() {
        let fill: Fill = "mixed=100".parse().unwrap();
        let mut page = [0; SLOTS];
        fill.write(7, 3, &mut page);
        for (one, next) in page.chunks(8).zip(page[8..].chunks(8)) {
            let differ = (0..8).filter(|field| one[*field] != next[*field]).collect::<Vec<_>>();
            assert_eq!((differ, one[0] >> 48), (vec![0, 5], 0));
        }
    }

    #[test]
    fn shares_must_make_a_hundred() {
        assert_eq!("zero=50,random=30,compressible=20".parse(), Ok(workload(Pattern::Uniform).fill));
        assert_eq!("random=100".parse::<Fill>().map(|fill| fill.random), Ok(100));
        for wrong in ["", "zero", "zero=50", "zero=101", "zero=-1", "noise=100", "zero=50,random=60"] {
            assert!(wrong.parse::<Fill>().is_err(), "{wrong:?}");
        }
    }
}
