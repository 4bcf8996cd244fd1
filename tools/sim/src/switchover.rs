//! The switchover: what the source sends while the guest is paused, and what it tells of missing pages. This is a model of
//! `source/switchover.rs` and `source/postcopy.rs` of `daemon/migrate`.

use memlane_protocol::PageSet;
use memlane_protocol::handover::Event as Told;
use memlane_protocol::wire::control::{Control, Missing};

use crate::event::HostId;
use crate::plant::Plant;
use crate::session::Session;
use crate::source::{Stage, work};
use crate::vmm::Command;
use crate::world::World;

impl World {
    pub(crate) fn look_again(&mut self, at: HostId, session: &mut Session, left: u32) {
        work(session).stage = Stage::Looking(left);
        self.ask(at, session, Command::Harvest);
    }

    /// Tells the destination the dirty pages that it has not been told. Returns how many there were.
    pub(crate) fn tell_dirty(&mut self, at: HostId, session: &mut Session) -> u64 {
        let work = work(session);
        let fresh = PageSet::new(self.plan.pages);
        for (word, bits) in work.sender.outbound.dirty.words(0..self.plan.pages) {
            fresh.insert_word(word, work.told_missing.insert_bits(word, bits));
        }
        self.tell_missing(at, session, &fresh);
        fresh.count()
    }

    /// Tells which blocks hold data, and that the rest is to be zero.
    pub(crate) fn tell_all(&mut self, at: HostId, session: &mut Session) {
        let fresh = self.new_blocks(session);
        let work = work(session);
        for page in (0..self.plan.pages).filter(|page| !fresh.contains(*page)) {
            match work.holes.last_mut() {
                Some(last) if last.end == page => last.end += 1,
                _ => work.holes.push(page..page + 1),
            }
        }
        self.send_holes(at, session);
        self.tell_missing(at, session, &fresh);
    }

    /// Returns the blocks that hold data and were not told, which are told now.
    pub(crate) fn new_blocks(&mut self, session: &mut Session) -> PageSet {
        const BLOCK: u64 = 8;
        let (memory, fresh) = (&self.vmms[session.vmm].memory, PageSet::new(self.plan.pages));
        for page in (0..self.plan.pages).filter(|page| !memory.is_hole(*page)) {
            let block = page / BLOCK * BLOCK;
            for page in block..(block + BLOCK).min(self.plan.pages) {
                if work(session).told_missing.insert(page) {
                    fresh.insert(page);
                }
            }
        }
        fresh
    }

    pub(crate) fn tell_missing(&mut self, at: HostId, session: &mut Session, pages: &PageSet) {
        work(session).missing_done = 0;
        self.tell_peer(at, session, &Control::Missing(missing(pages)));
    }

    pub(crate) fn is_told(&self, session: &mut Session) -> bool {
        let work = work(session);
        work.missing_done > 0
    }

    pub(crate) fn step_in_pause(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        let (now, vmm) = (self.clock.now(), session.vmm);
        let cheats = self.plant == Plant::AcknowledgementsNotAwaited;
        let settled = work(session).sender.outbound.all_acknowledged() || cheats;
        let stage = work(session).stage;
        match stage {
            Stage::Pausing => {
                let by = work(session).deadline_from(now);
                (work(session).paused_at, work(session).stage_by) = (Some(now), Some(by));
                self.limit_stage(at, session, by);
                if work(session).postcopy {
                    work(session).stage = Stage::SavingForPostcopy;
                    self.ask(at, session, Command::Save);
                } else {
                    work(session).stage = Stage::LastHarvest;
                    self.ask(at, session, Command::Harvest);
                }
            }
            Stage::LastHarvest => {
                let mut bench = self.bench(at, vmm);
                work(session).sender.publish(0, &mut bench);
                // QEMU saves last, as that takes hold of its disks.
                if self.plan.linked {
                    work(session).stage = Stage::Saving;
                    self.ask(at, session, Command::Save);
                } else {
                    work(session).stage = Stage::Acknowledging;
                }
            }
            Stage::Acknowledging if settled => {
                work(session).stage = Stage::Saving;
                self.ask(at, session, Command::Save);
            }
            Stage::Saving => {
                work(session).save_time = now - work(session).paused_at.unwrap_or(now);
                if self.plant == Plant::DeviceWritesMissed {
                    work(session).stage = Stage::LastAcknowledging;
                } else {
                    work(session).stage = Stage::SecondHarvest;
                    self.ask(at, session, Command::Harvest);
                }
            }
            Stage::SecondHarvest => {
                let mut bench = self.bench(at, vmm);
                work(session).sender.publish(0, &mut bench);
                work(session).stage = Stage::LastAcknowledging;
            }
            Stage::LastAcknowledging if settled => return self.send_state(at, session),
            Stage::Acknowledging | Stage::LastAcknowledging => {
                return if self.has_lanes(at, session) { None } else { self.fail(session) };
            }
            Stage::SavingForPostcopy => {
                work(session).save_time = now - work(session).paused_at.unwrap_or(now);
                if work(session).tracked {
                    work(session).stage = Stage::HarvestForPostcopy;
                    self.ask(at, session, Command::Harvest);
                } else {
                    let fresh = self.new_blocks(session);
                    if fresh.is_empty() {
                        return self.send_state(at, session);
                    }
                    self.tell_missing(at, session, &fresh);
                    work(session).stage = Stage::TellingForPostcopy;
                }
            }
            Stage::HarvestForPostcopy => {
                self.tell_dirty(at, session);
                work(session).stage = Stage::TellingForPostcopy;
            }
            Stage::SendingState => {
                let work = work(session);
                (work.stage, work.stage_by, work.sent) = (Stage::Idle, None, true);
                return Some(Told::Sent);
            }
            Stage::TellingForPostcopy if self.is_told(session) => return self.send_state(at, session),
            _ => {}
        }
        None
    }

    pub(crate) fn send_state(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        let bytes = vec![0; self.plan.state_bytes];
        self.tell_peer(at, session, &Control::State { total: bytes.len() as u64, offset: 0, bytes });
        work(session).stage = Stage::SendingState;
        None
    }
}

/// Returns the message that says that these pages are missing. Guests here are small enough for one.
pub(crate) fn missing(pages: &PageSet) -> Missing {
    let mut words = Vec::new();
    for (word, bits) in pages.words(0..pages.pages()) {
        words.resize(word as usize, 0);
        words.push(bits);
    }
    Missing { first: 0, words, last: true }
}
