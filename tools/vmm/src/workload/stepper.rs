//! [`Stepper`]: the steps of one vCPU, which can be skipped and undone.

use super::random::{step, step_back};

/// The number of 8-byte slots in a page.
pub const SLOTS: usize = 512;
/// The factor of a reader's sum: it computes `sum = (sum ^ slot) * READ_FACTOR` over all slots of a page. The factor is
/// odd, so that nothing is lost.
pub const READ_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// One write of 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The number of the page within the vCPU's part of the working set.
    pub page: u64,
    /// The slot in the page.
    pub slot: usize,
    /// The value that is written.
    pub value: u64,
}

/// The steps of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stepper {
    pub(super) random: u64,
    pub(super) done: u64,
    pub(super) cursor: u64,
    pub(super) pages: u64,
    pub(super) hot_pages: u64,
    /// The chance that a step goes to a hot page: 16 random bits are below this.
    pub(super) hot_chance: u64,
    pub(super) sequential: bool,
}

impl Stepper {
    /// Returns the stepper that it was when [`Stepper::position`] returned this; `None` if it cannot have been.
    pub fn at(&self, [random, done]: [u64; 2]) -> Option<Self> {
        let cursor = if self.pages == 0 { 0 } else { done % self.pages };
        (random != 0).then_some(Self { random, done, cursor, ..self.clone() })
    }

    /// Returns the state of the generator and the number of steps done.
    pub fn position(&self) -> [u64; 2] {
        [self.random, self.done]
    }

    /// Returns the stepper that it will be when `done` steps are done, without doing them.
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

    /// Undoes the last step, and returns it. There must be one.
    pub fn back(&mut self) -> Step {
        let value = self.random;
        self.cursor = if self.cursor == 0 { self.pages - 1 } else { self.cursor - 1 };
        self.done -= 1;
        let step = self.place(value);
        self.random = step_back(value);
        step
    }

    /// Returns the number of steps done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Returns the number of pages that steps may go to.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns the number of hot pages, which are the first ones, and how likely they are in 65,536ths.
    pub fn hot(&self) -> (u64, u64) {
        (self.hot_pages, self.hot_chance)
    }

    /// Returns whether pages are written in order.
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

    /// Computes where a value goes, with the cursor as it is before the step.
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

/// A linear map of 64 bits, given by what it makes of each bit.
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
