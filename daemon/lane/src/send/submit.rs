//! Handing frames to the kernel: by copying, by zero-copy sends, or through a pipe.

use std::os::fd::{AsFd, AsRawFd};

use io_uring::{opcode, types};

use super::method::SendMethod;
use super::splice::Progress;
use super::{Encryption, FRAMES, LaneSender};
use crate::ring::Completion;
use crate::{LaneError, LaneStats};

impl LaneSender {
    /// Hands the rest of the newest frame to the kernel.
    pub(super) fn hand_over_newest(&mut self) -> Result<(), LaneError> {
        self.sending = true;
        let slot = self.window.back_mut().expect("a frame has just been put into the window");
        match (slot.method, &mut self.splicer) {
            (SendMethod::Splice, Some(_)) => self.splice_newest(),
            _ => self.submit_newest(),
        }
    }

    fn submit_newest(&mut self) -> Result<(), LaneError> {
        /// `IORING_SEND_ZC_REPORT_USAGE`: say in the notification whether the pages were copied.
        const REPORT_USAGE: u16 = 1 << 3;
        let fd = types::Fd(self.socket.as_raw_fd());
        let slot = self.window.back_mut().expect("the frame being sent stays in the window");
        if let Some(Encryption { records, sealed }) = &mut self.encryption {
            if sealed.is_empty() {
                LaneStats::add(&self.stats.wire_bytes, sealed.fill(records, &mut slot.message)?);
                // Memory that is cut off reads as zeros, which must not be sent for the guest's data.
                self.send_state.ram.intact().map_err(LaneError::Memory)?;
            }
            let entry = sealed.send(self.socket.as_fd()).user_data(FRAMES + slot.sequence);
            // SAFETY: the sealed bytes lie on the heap, and are left alone until the send is complete. When the lane
            // ends earlier, `drop` waits for that, or gives up the memory for good.
            return unsafe { self.ring.push(&entry) }.map_err(LaneError::io("submit a frame"));
        }
        let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
        let message = slot.message.as_ptr();
        let entry = if slot.method == SendMethod::ZeroCopy {
            slot.notifications += 1;
            opcode::SendMsgZc::new(fd, message).ioprio(REPORT_USAGE).flags(flags).build()
        } else {
            opcode::SendMsg::new(fd, message).flags(flags).build()
        };
        // SAFETY: the message and its head lie on the heap and are left alone until the send is
        // complete, the frame acknowledged, and its pages released by the kernel. `send_state`
        // keeps guest memory mapped. A compressed block is never sent without copying, and is
        // written over by the next frame at the earliest, which begins when this send is complete.
        // When the lane ends earlier, `drop` waits for the same, or gives up the memory for good.
        unsafe { self.ring.push(&entry.user_data(FRAMES + slot.sequence)) }
            .map_err(LaneError::io("submit a frame"))
    }

    /// Sends through the pipe as much as the socket has room for. The rest follows when the socket has room again.
    fn splice_newest(&mut self) -> Result<(), LaneError> {
        let slot = self.window.back_mut().expect("the frame being sent stays in the window");
        let splicer = self.splicer.as_mut().expect("a lane that splices has a pipe");
        // SAFETY: the message points to the slot's head and to guest memory, which `send_state` keeps mapped.
        let progress = unsafe { splicer.send(&*self.socket, &mut slot.message, slot.payload_bytes as usize) };
        match progress.map_err(LaneError::io("send pages"))? {
            Progress::Done => {
                self.handed_over();
                Ok(())
            }
            Progress::NoRoom => {
                let fd = types::Fd(self.socket.as_raw_fd());
                let entry = opcode::PollAdd::new(fd, libc::POLLOUT as u32).build();
                // SAFETY: it points to nothing.
                unsafe { self.ring.push(&entry.user_data(FRAMES + slot.sequence)) }
                    .map_err(LaneError::io("wait for room in the send buffer"))
            }
            Progress::Impossible => {
                self.trials.rule_out(SendMethod::Splice);
                slot.method = SendMethod::Copy;
                self.submit_newest()
            }
        }
    }

    /// Takes the kernel's answer about a frame: a result, or a notification that pages are released.
    pub(super) fn take_sent(&mut self, sequence: u64, completion: Completion) -> Result<(), LaneError> {
        if let Some(copied) = completion.released {
            self.release(sequence, copied);
            return Ok(());
        }
        let slot = self.window.back_mut().expect("the frame being sent stays in the window");
        if !completion.more && slot.method == SendMethod::ZeroCopy {
            slot.notifications -= 1; // the send failed, so no notification follows
        }
        match completion.result {
            // The socket has room again.
            Ok(_) if slot.method == SendMethod::Splice => {}
            Ok(count) => match &mut self.encryption {
                Some(encryption) => encryption.sealed.advance(count as usize),
                None => slot.message.advance(count as usize),
            },
            Err(error) if slot.method == SendMethod::ZeroCopy && cannot_zero_copy(&error) => {
                self.trials.rule_out(SendMethod::ZeroCopy);
                slot.method = SendMethod::Copy;
            }
            Err(error) => return Err(LaneError::io("send pages")(error)),
        }
        let is_sealed = self.encryption.as_ref().is_some_and(|encryption| !encryption.sealed.is_empty());
        if slot.message.remaining() > 0 || is_sealed || slot.method == SendMethod::Splice {
            return self.hand_over_newest();
        }
        self.handed_over();
        Ok(())
    }

    /// Notes that the kernel has taken the newest frame.
    fn handed_over(&mut self) {
        let slot = self.window.back().expect("the frame being sent stays in the window");
        match slot.method {
            SendMethod::Copy => LaneStats::add(&self.stats.copied_bytes, slot.payload_bytes),
            SendMethod::Splice => LaneStats::add(&self.stats.zero_copy_bytes, slot.payload_bytes),
            // The kernel says later, in a notification, whether it copied.
            SendMethod::ZeroCopy => {}
        }
        self.sending = false;
        self.retire();
    }

    /// Notes that the kernel has released the pages of a zero-copy send; `copied` says whether it copied them.
    fn release(&mut self, sequence: u64, copied: bool) {
        self.trials.learn(copied);
        let mut slots = self.window.iter_mut().chain(&mut self.lingering);
        let Some(slot) = slots.find(|slot| slot.sequence == sequence) else { return };
        slot.notifications -= 1;
        if slot.notifications == 0 && slot.method == SendMethod::ZeroCopy {
            let counter = if copied { &self.stats.copied_bytes } else { &self.stats.zero_copy_bytes };
            LaneStats::add(counter, slot.payload_bytes);
        }
        if let Some(index) = self.lingering.iter().position(|slot| slot.notifications == 0) {
            self.spare.push(self.lingering.swap_remove(index));
        }
    }
}

/// Returns whether an error concerns zero-copy sends alone: the socket does not support them, or too many pages are
/// pinned.
fn cannot_zero_copy(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOMEM | libc::ENOBUFS | libc::EINVAL))
}
