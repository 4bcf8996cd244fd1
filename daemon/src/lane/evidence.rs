//! Zero-copy by evidence.
//!
//! The kernel may copy after all where it was asked not to (over loopback, veth, or a driver
//! without scatter-gather); then a zero-copy send costs more than a plain one. So a lane
//! tries, believes what `IORING_SEND_ZC_REPORT_USAGE` tells, and looks again now and then.

/// Frames sent in each trial.
const TRIAL_FRAMES: u32 = 4;
/// Bytes sent plainly between trials: a second or so at 100 Gbit/s.
const BYTES_BETWEEN_TRIALS: u64 = 16 << 30;
/// A frame with less than this is copied cheaper than its pages are pinned.
const WORTH_BYTES: u64 = 32 << 10;

/// Whether a lane asks for zero-copy.
#[derive(Debug)]
pub struct Evidence {
    trial_frames_left: u32,
    bytes_to_next_trial: u64,
    works: bool,
}

impl Evidence {
    pub fn new() -> Self {
        Self { trial_frames_left: TRIAL_FRAMES, bytes_to_next_trial: BYTES_BETWEEN_TRIALS, works: false }
    }

    /// Whether to send the next frame of so many bytes without copying.
    pub fn choose(&mut self, bytes: u64) -> bool {
        if bytes < WORTH_BYTES {
            return false;
        }
        if self.works {
            return true;
        }
        if self.trial_frames_left > 0 {
            self.trial_frames_left -= 1;
            return true;
        }
        self.bytes_to_next_trial = self.bytes_to_next_trial.saturating_sub(bytes);
        if self.bytes_to_next_trial == 0 {
            *self = Self::new();
        }
        false
    }

    /// The kernel tells whether it copied a frame that was sent without copying.
    pub fn learn(&mut self, copied: bool) {
        self.works = !copied;
        if copied {
            self.trial_frames_left = 0;
        }
    }

    /// The kernel cannot send this way at all.
    pub fn give_up(&mut self) {
        *self = Self { trial_frames_left: 0, bytes_to_next_trial: u64::MAX, works: false };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_back_to_copies_and_tries_again_later() {
        let mut evidence = Evidence::new();
        assert!(evidence.choose(1 << 20));
        evidence.learn(true);
        let plain = (0..1u64 << 15).take_while(|_| !evidence.choose(1 << 20)).count();
        assert_eq!(plain as u64, BYTES_BETWEEN_TRIALS >> 20);
        evidence.learn(false);
        assert!((0..1000).all(|_| evidence.choose(1 << 20)));
        assert!(!evidence.choose(4096), "small frames are always copied");
    }
}
