//! Chooses how a lane hands frames to the kernel, by trials.
//!
//! The kernel may copy although it was asked for a zero-copy send (over loopback, veth, or a driver without
//! scatter-gather). Such a send costs more than a plain one. So a lane tries zero-copy sends, learns from
//! `IORING_SEND_ZC_REPORT_USAGE` whether the kernel copied, and tries again now and then. Between the trials it sends by
//! reference through a pipe.

/// A trial sends this many frames.
const TRIAL_FRAMES: u32 = 4;
/// A lane sends this many bytes in other ways between trials, which takes a second or so at 100 Gbit/s.
const BYTES_BETWEEN_TRIALS: u64 = 16 << 30;
/// To copy a frame of fewer bytes than this costs less than to pin its pages.
const WORTH_BYTES: u64 = 32 << 10;

/// The method by which a frame is handed to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SendMethod {
    /// The kernel copies the frame.
    Copy,
    /// The kernel sends the pages themselves, and says later when it is done with them and whether it copied them.
    ZeroCopy,
    /// The pages go through a pipe by reference, and the kernel does not say when it is done with them.
    Splice,
}

/// The results of trials with the methods to send.
#[derive(Debug)]
pub(super) struct MethodTrials {
    trial_frames_left: u32,
    bytes_to_next_trial: u64,
    works: bool,
    splices: bool,
}

impl MethodTrials {
    /// Makes the trials of a lane. `splices` says whether the lane has a pipe.
    pub(super) fn new(splices: bool) -> Self {
        Self {
            trial_frames_left: TRIAL_FRAMES,
            bytes_to_next_trial: BYTES_BETWEEN_TRIALS,
            works: false,
            splices,
        }
    }

    /// Chooses the method for the next frame, which has so many bytes.
    pub(super) fn choose(&mut self, bytes: u64) -> SendMethod {
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

    /// Learns whether the kernel copied a frame of a zero-copy send.
    pub(super) fn learn(&mut self, copied: bool) {
        self.works = !copied;
        if copied {
            self.trial_frames_left = 0;
        }
    }

    /// Excludes a method that the kernel does not support on this connection.
    pub(super) fn rule_out(&mut self, method: SendMethod) {
        match method {
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
        trials.rule_out(SendMethod::ZeroCopy);
        assert!((0..1u64 << 15).all(|_| trials.choose(1 << 20) == SendMethod::Splice));
        trials.rule_out(SendMethod::Splice);
        assert_eq!(trials.choose(1 << 20), SendMethod::Copy);
    }
}
