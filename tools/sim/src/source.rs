//! The source: copies while the guest runs, and sends the rest while it is paused. The real convergence, bandwidth and
//! forecast decide. The stages are a model of `daemon/migrate/src/source/`.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use memlane_protocol::PageSet;
use memlane_protocol::bandwidth::Bandwidth;
use memlane_protocol::convergence::{Conditions, Convergence, Forecast, Measured, Policy};
use memlane_protocol::handover::{Action, Event as Told, Message, Phase};
use memlane_protocol::wire::control::Control;

use crate::event::{Answer, HostId, Wake};
use crate::lane::Sender;
use crate::outbound::Outbound;
use crate::plant::Plant;
use crate::session::{Role, Session};
use crate::vmm::Command;
use crate::world::World;

/// The lanes are looked at in these intervals.
pub(crate) const LOOK: Duration = Duration::from_millis(20);
/// A daemon that is slow has this long beyond the limit before a VMM ends the pause.
const GRACE: Duration = Duration::from_secs(1);

/// What the source works with.
#[derive(Debug)]
pub(crate) struct SourceWork {
    pub sender: Sender,
    pub policy: Policy,
    pub convergence: Convergence,
    pub bandwidth: Bandwidth,
    pub sampled: Option<(Duration, u64)>,
    pub looks: u64,
    pub stage: Stage,
    /// The ticket of the command that the stage waits for, and its answer.
    pub asked: Option<u64>,
    pub answer: Option<Answer>,
    pub iteration: u32,
    pub iteration_began: Duration,
    pub holes: Vec<Range<u64>>,
    pub holes_sent: u64,
    pub holes_made: u64,
    pub missing_done: u64,
    pub lanes_told: BTreeSet<u16>,
    /// There is no lane since this moment.
    pub without_lanes: Option<Duration>,
    pub told_missing: PageSet,
    pub tracked: bool,
    pub forecast: Option<Forecast>,
    pub postcopy: bool,
    pub paused_at: Option<Duration>,
    /// By this time the stage must have come to its end.
    pub stage_by: Option<Duration>,
    pub save_time: Duration,
    pub remote_load: Duration,
    pub remote_resume: Duration,
    pub sent: bool,
    pub learnt: bool,
    pub control_round_trip: Option<Duration>,
}

/// What the source is at. Each state waits for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Idle,
    Begin,
    Tracking,
    /// A piece is being protected, which begins and ends at these pages.
    Piece(u64, u64),
    /// The lanes are to catch up before the piece that begins here.
    Ahead(u64),
    Holes,
    Claiming,
    Settling,
    Harvesting,
    Stunning,
    Quiescing,
    Serving,
    Looking(u32),
    Telling(u32),
    Copied,
    Pausing,
    LastHarvest,
    Acknowledging,
    Saving,
    SecondHarvest,
    LastAcknowledging,
    SavingForPostcopy,
    HarvestForPostcopy,
    TellingForPostcopy,
    SendingState,
}

impl SourceWork {
    pub(crate) fn new(policy: Policy, pages: u64, paths: impl Iterator<Item = usize>) -> Self {
        Self {
            sender: Sender::new(Outbound::new(pages), paths),
            policy,
            convergence: Convergence::new(policy),
            bandwidth: Bandwidth::new(),
            sampled: None,
            looks: 0,
            stage: Stage::Idle,
            asked: None,
            answer: None,
            iteration: 0,
            iteration_began: Duration::ZERO,
            holes: Vec::new(),
            holes_sent: 0,
            holes_made: 0,
            missing_done: 0,
            lanes_told: BTreeSet::new(),
            without_lanes: None,
            told_missing: PageSet::new(pages),
            tracked: false,
            forecast: None,
            postcopy: false,
            paused_at: None,
            stage_by: None,
            save_time: Duration::ZERO,
            remote_load: Duration::ZERO,
            remote_resume: Duration::ZERO,
            sent: false,
            learnt: false,
            control_round_trip: None,
        }
    }

    pub(crate) fn deadline_from(&self, at: Duration) -> Duration {
        let later = self.forecast.map_or(Duration::ZERO, |forecast| forecast.after_commit());
        at + self.policy.downtime_limit.saturating_sub(later)
    }

    pub(crate) fn is_copying(&self) -> bool {
        self.stage != Stage::Idle
    }

    pub(crate) fn is_precopy(&self) -> bool {
        use Stage::*;
        matches!(
            self.stage,
            Tracking | Piece(..) | Ahead(_) | Holes | Claiming | Settling | Harvesting | Stunning | Quiescing
        )
    }

    /// Adds what was acknowledged since the last sample.
    pub(crate) fn sample(&mut self, now: Duration) {
        let Some((before, bytes_before)) = self.sampled else { return };
        let bytes = self.sender.acked_bytes();
        self.bandwidth.record(bytes - bytes_before, now - before);
        self.sampled = Some((now, bytes));
    }

    pub(crate) fn conditions(&self, path_round_trip: Duration) -> Conditions {
        Conditions {
            bandwidth: self.bandwidth.bytes_per_second(),
            round_trip: self.control_round_trip.unwrap_or(path_round_trip).max(self.sender.round_trip()),
            state_bytes: 0,
            verify: Duration::ZERO,
        }
    }
}

/// Returns the source's work of a session that has it.
pub(crate) fn work(session: &mut Session) -> &mut SourceWork {
    match &mut session.role {
        Role::Source(work) => work,
        _ => unreachable!("only a source works at this"),
    }
}

impl World {
    pub(crate) fn begin_source(&mut self, at: HostId, session: &mut Session, action: Action) {
        match action {
            Action::Copy => {
                work(session).stage = Stage::Begin;
                self.wake_after(at, LOOK, Wake::Look { migration: session.migration });
            }
            Action::Pause => {
                session.journal_time = Duration::ZERO;
                let (now, work) = (self.clock.now(), work(session));
                let longest = work.policy.downtime_limit + GRACE;
                let by = work.deadline_from(now);
                (work.stage, work.stage_by) = (Stage::Pausing, Some(by));
                self.limit_stage(at, session, by);
                self.ask(at, session, Command::Pause { longest });
            }
            _ => {}
        }
    }

    /// Wakes the session when its stage must have come to its end.
    pub(crate) fn limit_stage(&mut self, at: HostId, session: &mut Session, by: Duration) {
        let wait = by.saturating_sub(self.clock.now());
        self.wake_after(at, wait, Wake::Deadline { migration: session.migration });
    }

    /// The stage tells the VMM something, and waits for the answer.
    pub(crate) fn ask(&mut self, at: HostId, session: &mut Session, command: Command) {
        let ticket = self.ticket();
        (work(session).asked, work(session).answer) = (Some(ticket), None);
        self.command(session.vmm, command, session.asker(at, ticket));
    }

    /// The VMM has answered the stage.
    pub(crate) fn stage_answered(&mut self, session: &mut Session, ticket: u64, answer: Answer) {
        if let Role::Source(work) = &mut session.role
            && work.asked == Some(ticket)
        {
            (work.asked, work.answer) = (None, Some(answer));
        }
    }

    pub(crate) fn before_source(&mut self, session: &mut Session, event: Told) {
        if !matches!(event, Told::Message(Message::Running | Message::Fetching)) {
            return;
        }
        let (now, journal) = (self.clock.now(), session.journal_time);
        let (at, vmm) = (self.vmms[session.vmm].host, session.vmm);
        let work = work(session);
        let (Some(paused_at), false) = (work.paused_at, work.learnt) else { return };
        work.learnt = true;
        let downtime = now - paused_at;
        let Some(forecast) = work.forecast else { return };
        let measured = Measured {
            downtime,
            save: work.save_time,
            load: work.remote_load.min(downtime),
            journal: journal * 3,
            resume: work.remote_resume.min(downtime),
        };
        self.trace.note(now, || {
            format!("VMM {vmm} was paused for {downtime:?}, and {:?} was forecast", forecast.total())
        });
        if let Some(daemon) = &mut self.hosts[at].daemon {
            daemon.predictor.learn(&forecast, &measured);
        }
    }

    pub(crate) fn decided_source(&mut self, at: HostId, session: &mut Session) {
        let phase = session.machine.phase();
        if !matches!(phase, Phase::Copying | Phase::SwitchingOver) {
            self.end_stage(at, session);
        }
        if matches!(phase, Phase::Returning | Phase::Finishing | Phase::Completed) {
            self.end_serving(at, session);
        }
        session.commit_by = self.commit_by(session);
        if let Some(by) = session.commit_by {
            self.limit_stage(at, session, by);
        }
    }

    pub(crate) fn commit_by(&self, session: &Session) -> Option<Duration> {
        let Role::Source(work) = &session.role else { return None };
        let paused_at = work.paused_at.filter(|_| work.sent && session.machine.can_cancel())?;
        Some(work.deadline_from(paused_at))
    }

    pub(crate) fn end_stage(&mut self, at: HostId, session: &mut Session) {
        let work = work(session);
        (work.stage, work.asked, work.answer, work.stage_by) = (Stage::Idle, None, None, None);
        self.close_lanes(at, session);
        self.vmms[session.vmm].stun = None;
    }

    pub(crate) fn close_lanes(&mut self, at: HostId, session: &mut Session) {
        let connections: Vec<usize> = work(session).sender.lanes.iter().map(|lane| lane.connection).collect();
        for connection in connections {
            self.close(connection, at);
            work(session).sender.ended(connection);
        }
    }

    pub(crate) fn source_hears(
        &mut self,
        at: HostId,
        session: &mut Session,
        message: Control,
    ) -> Option<Told> {
        let vmm = session.vmm;
        match message {
            Control::Handover { message, nanoseconds, .. } => {
                let (took, work) = (Duration::from_nanos(nanoseconds), work(session));
                match message {
                    Message::Ready => work.remote_load = took,
                    Message::Running | Message::Fetching if !work.learnt => work.remote_resume = took,
                    _ => {}
                }
                return Some(Told::Message(message));
            }
            Control::LaneClosed(lane) if self.plant != Plant::NeverTakenBack => {
                work(session).sender.outbound.take_back(lane, self.plant == Plant::OrphansForgotten);
                let mut bench = self.bench(at, vmm);
                work(session).sender.publish(0, &mut bench);
            }
            Control::HolesDone => work(session).holes_made += 1,
            Control::MissingDone => work(session).missing_done += 1,
            _ => {}
        }
        None
    }

    /// Looks at the lanes, now and then.
    pub(crate) fn look_at_source(&mut self, at: HostId, session: &mut Session) {
        let now = self.clock.now();
        let Role::Source(work) = &mut session.role else { return };
        if !work.is_copying() {
            return;
        }
        work.looks += 1;
        if work.is_precopy() {
            work.sample(now);
            if work.looks % 5 == 0
                && let Some(rate) = work.convergence.stun_target(work.bandwidth.bytes_per_second())
                && let Some(stun) = &mut self.vmms[session.vmm].stun
            {
                stun.bucket.set_rate(rate, now);
            }
            if work.looks % 5 == 0 && !work.sender.outbound.is_quiesced() {
                for path in work.sender.missing_lanes(self.plan.lanes_per_path, now) {
                    self.open_lane(at, session.migration, path, None, &mut work.sender);
                }
            }
        }
        self.wake_after(at, LOOK, Wake::Look { migration: session.migration });
    }
}
