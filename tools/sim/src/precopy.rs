//! Pre-copy: the source sends memory in iterations while the guest runs. This is a model of `source/precopy.rs` and
//! `source/first_iteration.rs` of `daemon/migrate`.

use std::ops::Range;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::convergence::{Decision, Iteration, Verdict};
use memlane_protocol::handover::Event as Told;
use memlane_protocol::wire::control::Control;

use crate::channel::Channel;
use crate::event::{Answer, HostId};
use crate::plant::Plant;
use crate::session::Session;
use crate::source::{SourceWork, Stage, work};
use crate::vmm::Command;
use crate::world::World;

/// At most this many looks precede the pause in post-copy, while at least [`MANY`] pages are dirty. Guests here are
/// small, and so is the number.
const LOOKS: u32 = 3;
const MANY: u64 = 64;

impl World {
    /// Goes on with what the source is at, and returns what the machine is to hear.
    pub(crate) fn advance_source(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        let now = self.clock.now();
        loop {
            let commit_by = self.commit_by(session);
            let work = work(session);
            let late = work.stage_by.or(commit_by).is_some_and(|by| now >= by);
            if late && self.plant != Plant::DeadlineIgnored {
                self.trace.note(now, || "the pause is about to be too long".to_owned());
                work.sent = false;
                return self.fail(session);
            }
            let held_up = session.link.as_ref().is_some_and(Channel::is_held_up);
            let work = self::work(session);
            if work.stage == Stage::Idle || work.asked.is_some() || held_up {
                return None;
            }
            match work.answer.take() {
                Some(Answer::Done) | None => {}
                Some(Answer::Failed | Answer::Gone | Answer::Unheard) => return self.fail(session),
            }
            let before = work.stage;
            let event = self.step(at, session);
            if event.is_some() || self::work(session).stage == before {
                return event;
            }
        }
    }

    pub(crate) fn fail(&mut self, session: &mut Session) -> Option<Told> {
        (work(session).stage, work(session).stage_by) = (Stage::Idle, None);
        Some(Told::Failed)
    }

    /// Tells the destination of lost lanes. Returns whether there are any lanes, or may be again.
    pub(crate) fn has_lanes(&mut self, at: HostId, session: &mut Session) -> bool {
        let vmm = session.vmm;
        for lane in work(session).sender.outbound.orphaned_lanes() {
            if !work(session).lanes_told.insert(lane) {
                continue;
            }
            if self.plant == Plant::TakenBackUntold {
                work(session).sender.outbound.take_back(lane, false);
                let mut bench = self.bench(at, vmm);
                work(session).sender.publish(0, &mut bench);
            } else {
                self.tell_peer(at, session, &Control::LaneLost(lane));
            }
        }
        let (now, patience) = (self.clock.now(), session.patience);
        let work = work(session);
        if !work.sender.lanes.is_empty() {
            work.without_lanes = None;
            return true;
        }
        // They are opened again, unless they are to come to an end or the guest is paused.
        let since = *work.without_lanes.get_or_insert(now);
        work.is_precopy() && !work.sender.outbound.is_quiesced() && now < since + patience
    }

    /// Goes from one stage to the next if what it waits for is there.
    pub(crate) fn step(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        let (vmm, pages) = (session.vmm, self.plan.pages);
        let stage = work(session).stage;
        match stage {
            Stage::Idle | Stage::Copied => {}
            Stage::Begin => return self.begin_copy(at, session),
            Stage::Tracking => {
                work(session).tracked = true;
                self.begin_iteration(at, session);
                self.protect(at, session, 0);
            }
            Stage::Piece(first, end) => {
                if self.plant != Plant::ProtectedLate {
                    self.release(session, first..end);
                }
                work(session).stage = Stage::Ahead(end);
                let mut bench = self.bench(at, vmm);
                work(session).sender.publish(pages - end, &mut bench);
            }
            Stage::Ahead(first) => {
                if !self.has_lanes(at, session) {
                    return self.fail(session);
                }
                if work(session).sender.outbound.dirty.count() <= self.plan.pages_ahead {
                    if first < pages {
                        self.protect(at, session, first);
                    } else {
                        self.send_holes(at, session);
                        work(session).stage = Stage::Holes;
                    }
                }
            }
            Stage::Holes => {
                if !self.has_lanes(at, session) {
                    return self.fail(session);
                }
                let made = work(session).holes_made == work(session).holes_sent;
                if made || self.plant == Plant::HolesNotAwaited {
                    let nothing = work(session).sender.outbound.dirty.is_empty();
                    work(session).stage = if nothing { Stage::Settling } else { Stage::Claiming };
                }
            }
            Stage::Claiming | Stage::Settling => return self.end_iteration(at, session),
            Stage::Harvesting => return self.decide(at, session),
            Stage::Stunning => {
                let mut bench = self.bench(at, vmm);
                work(session).sender.publish(0, &mut bench);
                self.begin_iteration(at, session);
            }
            Stage::Quiescing => {
                if !work(session).sender.outbound.is_settled() {
                    if !self.has_lanes(at, session) {
                        return self.fail(session);
                    }
                } else {
                    self.close_lanes(at, session);
                    self.begin_to_serve(at, session, true);
                    work(session).stage = Stage::Serving;
                }
            }
            Stage::Serving => match self.is_serving(session) {
                Some(true) if work(session).tracked => self.look_again(at, session, LOOKS),
                Some(true) => {
                    self.tell_all(at, session);
                    work(session).stage = Stage::Telling(1);
                }
                Some(false) => return self.fail(session),
                None => {}
            },
            Stage::Looking(left) => {
                let found = self.tell_dirty(at, session);
                work(session).stage = Stage::Telling(if found < MANY { 1 } else { left });
            }
            Stage::Telling(left) => {
                if self.is_told(session) {
                    if left > 1 {
                        self.look_again(at, session, left - 1);
                    } else {
                        work(session).stage = Stage::Copied;
                        return Some(Told::SwitchOver);
                    }
                }
            }
            _ => return self.step_in_pause(at, session),
        }
        None
    }

    pub(crate) fn begin_copy(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        let memory = self.plan.pages * PAGE_SIZE;
        let round_trip = self.path_round_trip();
        let Some(daemon) = &self.hosts[at].daemon else { return None };
        let work = work(session);
        let verdict =
            work.convergence.before_iterations(memory, &work.conditions(round_trip), &daemon.predictor);
        match verdict {
            None => {
                work.stage = Stage::Tracking;
                self.ask(at, session, Command::Track);
            }
            Some(verdict) if matches!(verdict.decision, Decision::GiveUp { .. }) => {
                return self.fail(session);
            }
            Some(verdict) => {
                work.forecast = Some(verdict.forecast);
                self.open_postcopy(session);
                // Beginning and ending to track, which prepares a VMM to give up its guest.
                self.ask(at, session, Command::StopTracking);
            }
        }
        None
    }

    pub(crate) fn begin_iteration(&mut self, at: HostId, session: &mut Session) {
        let now = self.clock.now();
        let work = work(session);
        work.iteration += 1;
        work.iteration_began = now;
        work.sampled = Some((now, work.sender.acked_bytes()));
        work.stage = if work.sender.outbound.dirty.is_empty() { Stage::Settling } else { Stage::Claiming };
        let (number, pages) = (work.iteration, work.sender.outbound.dirty.count());
        self.tell_peer(at, session, &Control::Iteration { number, pages });
    }

    /// Protects the next piece of memory.
    pub(crate) fn protect(&mut self, at: HostId, session: &mut Session, first: u64) {
        let end = (first + self.plan.piece_pages).min(self.plan.pages);
        if self.plant == Plant::ProtectedLate {
            self.release(session, first..end);
            let mut bench = self.bench(at, session.vmm);
            work(session).sender.publish(0, &mut bench);
        }
        work(session).stage = Stage::Piece(first, end);
        self.ask(at, session, Command::Protect(first..end));
    }

    /// Has lanes send what a piece holds, and notes its holes.
    pub(crate) fn release(&mut self, session: &mut Session, piece: Range<u64>) {
        let memory = &self.vmms[session.vmm].memory;
        let work = work(session);
        for page in piece {
            if !memory.is_hole(page) {
                work.sender.outbound.dirty.insert(page);
                continue;
            }
            match work.holes.last_mut() {
                Some(last) if last.end == page => last.end += 1,
                _ => work.holes.push(page..page + 1),
            }
        }
    }

    pub(crate) fn send_holes(&mut self, at: HostId, session: &mut Session) {
        let holes = std::mem::take(&mut work(session).holes);
        if holes.is_empty() {
            return;
        }
        work(session).holes_sent += 1;
        self.tell_peer(at, session, &Control::Holes(holes));
    }

    pub(crate) fn end_iteration(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        let SourceWork { sender, stage, .. } = work(session);
        let ended = match stage {
            Stage::Settling => sender.outbound.all_acknowledged(),
            _ => sender.outbound.dirty.is_empty(),
        };
        if !ended {
            return if self.has_lanes(at, session) { None } else { self.fail(session) };
        }
        let now = self.clock.now();
        work(session).sample(now);
        work(session).stage = Stage::Harvesting;
        self.ask(at, session, Command::Harvest);
        None
    }

    /// Decides what follows an iteration, whose harvest is in.
    pub(crate) fn decide(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        let (now, round_trip) = (self.clock.now(), self.path_round_trip());
        let mut bench = self.bench(at, session.vmm);
        work(session).sender.publish(0, &mut bench);
        let Some(daemon) = &self.hosts[at].daemon else { return None };
        let work = work(session);
        let outbound = &work.sender.outbound;
        let remaining = outbound.dirty.count() + outbound.in_flight.count();
        let iteration = Iteration {
            number: work.iteration,
            duration: now - work.iteration_began,
            dirtied_pages: work.sender.harvested,
            remaining_bytes: remaining * PAGE_SIZE,
        };
        let conditions = work.conditions(round_trip);
        let verdict = work.convergence.after_iteration(&iteration, &conditions, &daemon.predictor);
        work.forecast = Some(verdict.forecast);
        self.trace.note(now, || format!("after {iteration:?}: {verdict}"));
        self.check_verdict(session, &verdict);
        self.follow(at, session, &verdict)
    }

    pub(crate) fn follow(&mut self, at: HostId, session: &mut Session, verdict: &Verdict) -> Option<Told> {
        match verdict.decision {
            Decision::Continue => self.begin_iteration(at, session),
            Decision::Stun { pages_per_second, .. } => {
                self.tally.stunned += 1;
                match &mut self.vmms[session.vmm].stun {
                    Some(stun) => {
                        stun.bucket.set_rate(pages_per_second, self.clock.now());
                        self.begin_iteration(at, session);
                    }
                    None => {
                        work(session).stage = Stage::Stunning;
                        self.ask(at, session, Command::Stun(pages_per_second));
                    }
                }
            }
            Decision::SwitchOver => {
                work(session).stage = Stage::Copied;
                return Some(Told::SwitchOver);
            }
            Decision::Postcopy { .. } => self.open_postcopy(session),
            Decision::GiveUp { .. } => return self.fail(session),
        }
        None
    }

    pub(crate) fn open_postcopy(&mut self, session: &mut Session) {
        let work = work(session);
        work.postcopy = true;
        work.sender.outbound.quiesce();
        work.stage = Stage::Quiescing;
    }
}
