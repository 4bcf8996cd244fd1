//! How a lane hands frames over, by evidence.
//!
//! The kernel may copy after all where it was asked not to (over loopback, veth, or a driver
//! without scatter-gather); then a zero-copy send costs more than a plain one. So a lane
//! tries, believes what `IORING_SEND_ZC_REPORT_USAGE` tells, and looks again now and then. Between
//! the trials it sends by reference through a pipe.

/// Frames sent in each trial.
const TRIAL_FRAMES: u32 = 4;
/// Bytes sent plainly between trials: a second or so at 100 Gbit/s.
const BYTES_BETWEEN_TRIALS: u64 = 16 << 30;
/// A frame with less than this is copied cheaper than its pages are pinned.
const WORTH_BYTES: u64 = 32 << 10;

/// How a frame is handed to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendMethod {
    /// By copying it.
    Copy,
    /// By a zero-copy send, of which the kernel says when it is done with the pages, and whether it copied them.
    ZeroCopy,
    /// Through a pipe: by reference, of which nothing is said.
    Splice,
}

/// What has been seen of the ways to send.
#[derive(Debug)]
pub struct MethodTrials {
    trial_frames_left: u32,
    bytes_to_next_trial: u64,
    works: bool,
    splices: bool,
}

impl MethodTrials {
    /// Of a lane that has a pipe, if `splices`.
    pub fn new(splices: bool) -> Self {
        Self {
            trial_frames_left: TRIAL_FRAMES,
            bytes_to_next_trial: BYTES_BETWEEN_TRIALS,
            works: false,
            splices,
        }
    }

    /// How to send the next frame, of so many bytes.
    pub fn choose(&mut self, bytes: u64) -> SendMethod {
        if bytes < WORTH_BYTES {
            return SendMethod::Copy;
        }
        if self.works {
            return SendMethod::ZeroCopy;
        }
        if self.trial_frames_left > 0 {
            self.trial_frames_left -= 1;
            return SendMethod::ZeroCopy;
        }
        self.bytes_to_next_trial = self.bytes_to_next_trial.saturating_sub(bytes);
        if self.bytes_to_next_trial == 0 {
            *self = Self::new(self.splices);
        }
        if self.splices { SendMethod::Splice } else { SendMethod::Copy }
    }

    /// The kernel tells whether it copied a frame that was sent without copying.
    pub fn learn(&mut self, copied: bool) {
        self.works = !copied;
        if copied {
            self.trial_frames_left = 0;
        }
    }

    /// The kernel cannot send this way at all.
    pub fn give_up(&mut self, way: SendMethod) {
        match way {
            SendMethod::Copy => {}
            SendMethod::ZeroCopy => {
                (self.trial_frames_left, self.bytes_to_next_trial, self.works) = (0, u64::MAX, false);
            }
            SendMethod::Splice => self.splices = false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_back_to_a_pipe_or_copies_and_tries_again_later() {
        for (splices, otherwise) in [(true, SendMethod::Splice), (false, SendMethod::Copy)] {
            let mut trials = MethodTrials::new(splices);
            assert_eq!(trials.choose(1 << 20), SendMethod::ZeroCopy);
            trials.learn(true);
            let until_trial = (0..1u64 << 15).take_while(|_| trials.choose(1 << 20) == otherwise).count();
            assert_eq!(until_trial as u64, BYTES_BETWEEN_TRIALS >> 20);
            trials.learn(false);
            assert!((0..1000).all(|_| trials.choose(1 << 20) == SendMethod::ZeroCopy));
            assert_eq!(trials.choose(4096), SendMethod::Copy, "small frames are always copied");
        }
    }

    #[test]
    fn what_cannot_be_done_is_not_tried_again() {
        let mut trials = MethodTrials::new(true);
        trials.give_up(SendMethod::ZeroCopy);
        assert!((0..1u64 << 15).all(|_| trials.choose(1 << 20) == SendMethod::Splice));
        trials.give_up(SendMethod::Splice);
        assert_eq!(trials.choose(1 << 20), SendMethod::Copy);
    }
}
