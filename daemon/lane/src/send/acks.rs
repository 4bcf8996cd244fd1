//! Acknowledgements, and the window of frames that they move.

use std::mem;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use io_uring::{opcode, types};
use memlane_protocol::window::Flow;
use memlane_protocol::wire::frame::{ACK_BYTES, Ack, Content};
use rustix::net::sockopt::set_socket_send_buffer_size_force;

use super::{ACKS, Encryption, LaneSender};
use crate::ring::Completion;
use crate::{LaneError, LaneStats};

impl LaneSender {
    /// Takes acknowledgements that were read, and listens for more.
    pub(super) fn take_acks(&mut self, completion: Completion) -> Result<(), LaneError> {
        match completion.result {
            Ok(0) => return Err(LaneError::HungUp),
            Ok(count) => self.open_acks(count as usize)?,
            Err(error) => return Err(LaneError::io("read acknowledgements")(error)),
        }
        loop {
            self.take_whole_acks()?;
            // More may have come than there is room for at once.
            if !self.copy_acks()? {
                break;
            }
        }
        self.retire();
        self.update_window();
        self.listen_for_acks()
    }

    /// Takes the acknowledgements that have come whole.
    fn take_whole_acks(&mut self) -> Result<(), LaneError> {
        let whole = self.acks_filled / ACK_BYTES * ACK_BYTES;
        for bytes in self.acks[..whole].chunks_exact(ACK_BYTES) {
            let found = Ack::decode(bytes)?.sequence;
            if found > self.sequence {
                return Err(LaneError::Sequence { expected: self.sequence, found });
            }
            self.acknowledged = self.acknowledged.max(found);
            self.last_ack = Instant::now();
        }
        self.acks.copy_within(whole..self.acks_filled, 0);
        self.acks_filled -= whole;
        Ok(())
    }

    /// Notes that so many bytes have come, and opens them if need be.
    fn open_acks(&mut self, count: usize) -> Result<(), LaneError> {
        match &mut self.encryption {
            None => self.acks_filled += count,
            Some(Encryption { records, .. }) => {
                records.received(count);
                self.copy_acks()?;
            }
        }
        Ok(())
    }

    /// Moves acknowledgements that were opened to where they are read. Returns whether there were any.
    fn copy_acks(&mut self) -> Result<bool, LaneError> {
        let Some(Encryption { records, .. }) = &mut self.encryption else { return Ok(false) };
        let free = &mut self.acks[self.acks_filled..];
        let data = records.data()?;
        let count = data.len().min(free.len());
        free[..count].copy_from_slice(&data[..count]);
        records.consume(count);
        self.acks_filled += count;
        Ok(count > 0)
    }

    /// Tells the window's limit how the lane does, and asks the kernel for a send buffer that fits it.
    fn update_window(&mut self) {
        let flow = Flow {
            acked_bytes: self.stats.acked_bytes.load(Ordering::Relaxed),
            round_trip: self.health.round_trip(),
            full: mem::take(&mut self.full),
        };
        self.limit.observe(self.health.now(), &flow);
        self.waker.set_bytes_per_second(self.limit.bytes_per_second());
        if let (Some(compressor), Some(clock)) = (&mut self.compressor, &self.clock) {
            let acked_bytes = self.stats.acked_bytes.load(Ordering::Relaxed);
            compressor.observe(self.health.now(), clock, (acked_bytes, self.delivered_bytes));
        }
        let target = self.limit.bytes();
        // An increase by less than a quarter is not worth a system call.
        if target > self.send_buffer + self.send_buffer / 4 {
            // This fails without CAP_NET_ADMIN: the kernel then goes on to size the buffer by itself. `SO_SNDBUF` would
            // stop the kernel from doing that, and often gives less.
            let _ = set_socket_send_buffer_size_force(&*self.socket, target as usize);
            self.send_buffer = target;
        }
    }

    /// Removes frames from the window that the destination has acknowledged.
    pub(super) fn retire(&mut self) {
        let handed_over = self.sequence - u64::from(self.sending);
        let done = self.acknowledged.min(handed_over);
        while self.window.front().is_some_and(|slot| slot.sequence <= done) {
            let slot = self.window.pop_front().expect("the front was there");
            for run in &slot.runs {
                let pages = run.pages.end - run.pages.start;
                match run.content {
                    Content::Data => LaneStats::add(&self.stats.data_pages, pages),
                    Content::Zero | Content::Hole => LaneStats::add(&self.stats.zero_pages, pages),
                }
                self.send_state.in_flight.remove_range(run.pages.clone());
            }
            self.send_state.settle(1);
            self.window_bytes -= slot.payload_bytes;
            self.delivered_bytes += slot.contents_bytes;
            LaneStats::add(&self.stats.acked_bytes, slot.payload_bytes);
            let rest = if slot.notifications == 0 { &mut self.spare } else { &mut self.lingering };
            rest.push(slot);
        }
        if self.window.is_empty() {
            (self.send_state.bell)();
        }
    }

    pub(super) fn listen_for_acks(&mut self) -> Result<(), LaneError> {
        let free = match &mut self.encryption {
            Some(encryption) => encryption.records.room(),
            None => &mut self.acks[self.acks_filled..],
        };
        let fd = types::Fd(self.socket.as_raw_fd());
        let entry = opcode::Recv::new(fd, free.as_mut_ptr(), free.len() as u32).build();
        // SAFETY: either buffer is boxed, this part of it is not touched until the operation
        // completes, and `drop` keeps it until then.
        unsafe { self.ring.push(&entry.user_data(ACKS)) }.map_err(LaneError::io("read acknowledgements"))
    }
}
