//! What must hold: at every step, and when everything has come to its end.

use std::collections::VecDeque;
use std::time::Duration;

use memlane_protocol::convergence::{Decision, Verdict};
use memlane_protocol::handover::{Message, Record};

use crate::event::{HostId, MigrationId};
use crate::network::Purpose;
use crate::session::{Role, Session};
use crate::vmm::State;
use crate::world::World;

/// The guest was lost, or may have been, when something ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The VMM that had the only copy of the guest ended.
    VmmOfGuest,
    /// The source's VMM ended after the commit, with a guest that the destination had whole.
    VmmOfSourceAfterCommit,
    /// In post-copy, the source's VMM and daemon both ended.
    MemoryAtSource,
    /// An operator gave up the guest's missing pages.
    Abandoned,
}

/// Nothing may wait in longer queues on a connection: more than a window holds in frames.
const LONGEST_QUEUE: usize = 4096;

impl World {
    /// Tells whether the documents allow that the guest is lost. All such cases are listed here.
    ///
    /// - The VMM that has the guest's only copy ends ([`memlane_protocol::handover::Outcome::VmmGone`]).
    /// - The destination gives the guest back, and the source's VMM has ended meanwhile: it had the only copy by then.
    /// - In post-copy, the VMM at the source and its daemon both end: no one has the memory then.
    /// - An operator abandons the missing pages.
    pub(crate) fn may_be_lost(&self) -> bool {
        self.losses.iter().any(|loss| match loss {
            Loss::VmmOfGuest | Loss::MemoryAtSource | Loss::Abandoned => true,
            Loss::VmmOfSourceAfterCommit => self.declined,
        })
    }

    /// Notes the first thing that must not be.
    pub(crate) fn violated(&mut self, what: String) {
        self.trace.note(self.clock.now(), || format!("VIOLATED: {what}"));
        self.violation.get_or_insert(what);
    }

    /// Checks that one VMM runs the guest at most, and that none may begin to by itself while another does.
    pub(crate) fn check_owners(&mut self) {
        let running: Vec<usize> =
            (0..self.vmms.len()).filter(|vmm| self.vmms[*vmm].state == State::Running).collect();
        if running.len() > 1 {
            self.violated(format!("VMMs {running:?} run the guest at the same time"));
        }
        let linked = self.plan.linked;
        if let (Some(there), Some(alone)) =
            (running.first(), self.vmms.iter().position(|vmm| vmm.may_resume_alone(linked)))
        {
            self.violated(format!("VMM {alone} may resume by itself the guest that VMM {there} runs"));
        }
    }

    /// Checks all of the memory with which a VMM begins to run the guest.
    pub(crate) fn check_start(&mut self, vmm: usize) {
        let memory = &self.vmms[vmm].memory;
        let wrong = (0..self.plan.pages).find(|page| {
            let waits = memory.waits && memory.is_hole(*page);
            !waits && memory.version(*page) != self.truth[*page as usize]
        });
        if let Some(page) = wrong {
            let (found, newest) = (memory.version(page), self.truth[page as usize]);
            self.violated(format!(
                "VMM {vmm} begins to run the guest with version {found} of page {page}, and the newest is {newest}"
            ));
        }
    }

    /// Tells whether the guest runs in another VMM: what is here is of no use then, and will be discarded.
    fn runs_elsewhere(&self, vmm: usize) -> bool {
        self.vmms.iter().enumerate().any(|(other, it)| other != vmm && it.state == State::Running)
    }

    /// Checks memory of which nothing is missing any more.
    pub(crate) fn check_whole(&mut self, vmm: usize) {
        if self.runs_elsewhere(vmm) {
            return;
        }
        let memory = &self.vmms[vmm].memory;
        let wrong = (0..self.plan.pages).find(|page| memory.version(*page) != self.truth[*page as usize]);
        if let Some(page) = wrong {
            let (found, newest) = (memory.version(page), self.truth[page as usize]);
            self.violated(format!(
                "all pages are said to be at VMM {vmm}, which has version {found} of page {page} of {newest}"
            ));
        }
    }

    /// Checks what the guest reads.
    pub(crate) fn check_read(&mut self, vmm: usize, page: u64, found: u32) {
        let newest = self.truth[page as usize];
        if found != newest {
            self.violated(format!(
                "the guest in VMM {vmm} reads version {found} of page {page}, and the newest is {newest}"
            ));
        }
    }

    /// Checks a page that was placed beneath a guest which may run.
    pub(crate) fn check_placed(&mut self, vmm: usize, page: u64, version: u32) {
        let newest = self.truth[page as usize];
        if version != newest && !self.runs_elsewhere(vmm) {
            self.violated(format!(
                "version {version} of page {page} is placed in VMM {vmm}, and the newest is {newest}"
            ));
        }
    }

    /// Checks that the commit begins to be written within the limit.
    pub(crate) fn check_commit(&mut self, at: HostId, session: &Session) {
        let stood_still = self.hosts[at]
            .stood_still
            .is_some_and(|until| until + Duration::from_secs(60) > self.clock.now());
        let Some(commit_by) = session.commit_by else { return };
        if self.clock.now() > commit_by && !stood_still {
            let late = self.clock.now() - commit_by;
            self.violated(format!("the commit begins to be written {late:?} after the pause had to end"));
        }
    }

    /// Checks that what a session says is in its journal, so that a restarted daemon would say the same.
    pub(crate) fn check_word(&mut self, at: HostId, session: &Session, message: Message) {
        let promised = match message {
            Message::Commit => Record::Committed,
            Message::Ready => Record::Prepared,
            Message::Running | Message::Fetching | Message::Recovering => Record::Running,
            Message::Declined => Record::Declined,
            _ => return,
        };
        let noted = self.hosts[at].journal.get(&session.migration).map(|(record, ..)| *record);
        if noted != Some(promised) {
            self.violated(format!("host {at} says {message:?}, and its journal has {noted:?}"));
        }
    }

    /// Checks that a decision keeps what it promises.
    pub(crate) fn check_verdict(&mut self, session: &Session, verdict: &Verdict) {
        let figures = &verdict.figures;
        if verdict.decision == Decision::SwitchOver && figures.downtime > figures.downtime_limit {
            let migration = session.migration;
            self.violated(format!("migration {migration} switches over with a forecast beyond its limit"));
        }
    }

    /// Notes when the guest was paused.
    pub(crate) fn paused(&mut self, vmm: usize) {
        self.paused_since = Some((vmm, self.clock.now()));
    }

    /// Notes that the guest runs, and checks how long it was paused, in a run in which all is as it was measured.
    pub(crate) fn began_to_run(&mut self, vmm: usize) {
        let Some((paused_in, since)) = self.paused_since.take() else { return };
        let pause = self.clock.now() - since;
        let moved = vmm != paused_in;
        self.tally.moved += u64::from(moved);
        if !self.plan.is_calm() {
            return;
        }
        // What follows the commit is forecast, and may turn out to take a little longer.
        let tail = self.plan.command_time * 3 + self.plan.sync_time * 3 + self.network.paths[0].latency * 8;
        let most = self.order_policy().downtime_limit + tail;
        self.tally.longest_pause = self.tally.longest_pause.max(pause);
        if pause > most {
            let limit = self.order_policy().downtime_limit;
            self.violated(format!("nothing went wrong, and the pause took {pause:?} of {limit:?}"));
        }
    }

    /// Checks that a lane keeps its window.
    pub(crate) fn check_window(&mut self, session: &Session, purpose: Purpose) {
        let sender = match (&session.role, purpose) {
            (Role::Source(work), Purpose::Lane { .. }) => Some(&work.sender),
            _ => session.serving.as_ref().map(|serving| &serving.sender),
        };
        if let Some((bytes, most)) = sender.and_then(|sender| sender.overdrawn) {
            self.violated(format!("a lane has {bytes} bytes in flight, and {most} at most are allowed"));
        }
    }

    /// Notes a message of a migration's own connection, which is to come once and in its turn.
    pub(crate) fn said(&mut self, migration: MigrationId, from: HostId, bytes: Vec<u8>) {
        self.under_way.entry((migration, from)).or_default().push_back(bytes);
    }

    /// Checks that such a message is the next one.
    pub(crate) fn check_heard(&mut self, migration: MigrationId, to: HostId, bytes: &[u8]) {
        let next = self.under_way.get_mut(&(migration, 1 - to)).and_then(VecDeque::pop_front);
        if next.as_deref() != Some(bytes) {
            self.violated(format!(
                "host {to} migration {migration}: a message was lost, doubled or overtaken"
            ));
        }
    }

    /// Checks queues.
    pub(crate) fn check_queues(&mut self) {
        let longest = self.network.longest_queue();
        if longest > LONGEST_QUEUE {
            self.violated(format!("{longest} things are under way on one connection"));
        }
    }

    /// Returns what is not at its end yet.
    pub(crate) fn unfinished(&self) -> Option<String> {
        for (at, host) in self.hosts.iter().enumerate() {
            let Some(daemon) = &host.daemon else { return Some(format!("the daemon of host {at} is down")) };
            if let Some((migration, session)) = daemon.sessions.iter().next() {
                let (phase, reach) = (session.machine.phase(), session.reach);
                return Some(format!(
                    "migration {migration} at host {at} is {phase}, its VMM is {reach:?}; {}",
                    session.waits_for()
                ));
            }
            if let Some(migration) = daemon.preflights.keys().next() {
                return Some(format!("the preflight of migration {migration} at host {at}"));
            }
            if let Some((migration, (record, ..))) = host.journal.iter().next() {
                return Some(format!("the journal of host {at} has `{record}` of migration {migration}"));
            }
        }
        let stuck = |vmm: &crate::vmm::Vmm| {
            matches!(vmm.state, State::Paused | State::Relinquished | State::Loaded) || vmm.stun.is_some()
        };
        let vmm = self.vmms.iter().position(stuck)?;
        Some(format!("VMM {vmm} is {:?}", self.vmms[vmm].state))
    }

    /// Checks where everything has come to its end: the guest has one owner, and all of its memory.
    pub(crate) fn check_end(&mut self) {
        let Some(vmm) = self.vmms.iter().position(|vmm| vmm.state == State::Running) else {
            if !self.may_be_lost() {
                self.violated("nobody runs the guest, and nothing happened that may lose it".to_owned());
            }
            self.tally.lost += 1;
            return;
        };
        let there = &self.vmms[vmm];
        if there.poisoned {
            if !self.may_be_lost() {
                self.violated(
                    "the guest's missing pages fail, and nothing happened that may lose them".to_owned(),
                );
            }
            self.tally.lost += 1;
            return;
        }
        if there.memory.waits {
            return self.violated(format!("the guest in VMM {vmm} still waits for pages"));
        }
        self.check_whole(vmm);
    }
}
