//! VMMs: the processes that have the guest or wait for it, and do what daemons tell them. This is a model of
//! `daemon/guest`, `kvm-backend` and QEMU.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use memlane_protocol::handover::{Action, Record};
use memlane_protocol::throttle::{FaultAround, TokenBucket};

use crate::event::{Answer, Event, HostId, MigrationId, Wake};
use crate::invariants::Loss;
use crate::memory::{Access, Memory};
use crate::plant::Plant;
use crate::world::World;

/// A QEMU that hangs is tried again after this time.
const HANGING: Duration = Duration::from_millis(100);

/// One VMM.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub host: HostId,
    pub state: State,
    pub memory: Memory,
    /// The daemon that the VMM is connected to, by its number.
    pub attached: Option<u32>,
    /// The number of times that it has attached.
    pub attachment: u64,
    /// What the VMM remembers of a migration.
    pub bond: Option<Bond>,
    /// The guest's writes are held up.
    pub stun: Option<Stun>,
    /// Some of the guest's pages were given up: accesses to them fail.
    pub poisoned: bool,
    /// The VMM keeps a copy of the userfaultfd.
    pub keeps: bool,
    /// The main loop of a QEMU waits for this page, and its monitor does not answer.
    pub hangs: Option<u64>,
    /// The VMM was told to let the guest run, or may have been.
    pub told_to_run: bool,
    commands: VecDeque<(Command, Asker)>,
    /// The number of the command that it is at.
    serial: u64,
    /// The number of the pause.
    pause: u64,
}

/// What the guest in a VMM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Incoming,
    Loaded,
    Running,
    /// A linked VMM ends this by itself if its daemon goes away.
    Paused,
    Relinquished,
    Ended,
}

/// What a VMM remembers of its migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bond {
    pub migration: MigrationId,
    pub fetching: bool,
}

/// How a stun holds up writes.
#[derive(Debug)]
pub(crate) struct Stun {
    pub bucket: TokenBucket,
    pub around: FaultAround,
}

/// What a VMM can be told.
#[derive(Debug, Clone)]
pub(crate) enum Command {
    Track,
    StopTracking,
    Protect(Range<u64>),
    Harvest,
    Stun(u64),
    Pause {
        longest: Duration,
    },
    Save,
    /// It hands over a userfaultfd, so that accesses to what is missing wait.
    OpenMemory,
    /// It hands over again the userfaultfd that it keeps.
    ReopenMemory,
    Load,
    Prepare(Bond),
    Relinquish(Bond),
    Resume,
    Discard,
}

/// Who waits for the answer to a command.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asker {
    pub host: HostId,
    pub migration: MigrationId,
    /// The command goes over this connection of the VMM.
    pub attachment: u64,
    pub ticket: u64,
}

impl Vmm {
    pub(crate) fn new(host: HostId, state: State, pages: u64) -> Self {
        let (attached, attachment, bond, stun, commands, serial, pause) = Default::default();
        Self {
            host,
            state,
            memory: Memory::new(pages),
            attached,
            attachment,
            bond,
            stun,
            poisoned: false,
            keeps: false,
            hangs: None,
            told_to_run: false,
            commands,
            serial,
            pause,
        }
    }

    /// Tells whether the guest may begin to run here without any daemon's word.
    pub(crate) fn may_resume_alone(&self, linked: bool) -> bool {
        self.state == State::Paused && linked
    }
}

impl World {
    /// Tells a VMM to do something, which takes a while.
    pub(crate) fn command(&mut self, vmm: usize, command: Command, asker: Asker) {
        let Self { vmms, .. } = self;
        let told = &mut vmms[vmm];
        let connected = told.attached.is_some() && told.attachment == asker.attachment;
        if !connected || told.state == State::Ended {
            return self.answer(asker, Answer::Unheard);
        }
        if matches!(command, Command::Resume) {
            told.told_to_run = true;
        }
        told.commands.push_back((command, asker));
        if told.commands.len() == 1 {
            self.begin_command(vmm);
        }
    }

    fn begin_command(&mut self, vmm: usize) {
        let takes = self.plan.command_time;
        let mut wait = self.dice.about(takes, 50);
        let told = &mut self.vmms[vmm];
        let Some((command, _)) = told.commands.front() else { return };
        if matches!(command, Command::Save | Command::Load) {
            wait += self.plan.state_time;
        }
        told.serial += 1;
        self.clock.after(wait, Event::Obey { vmm, serial: told.serial });
    }

    /// Has the VMM do the command that it is at.
    pub(crate) fn obey(&mut self, vmm: usize, serial: u64) {
        if self.vmms[vmm].serial != serial {
            return; // it was not done, as the connection or the VMM ended
        }
        let Some((command, asker)) = self.vmms[vmm].commands.pop_front() else { return };
        self.serve_command(vmm, command, Some(asker));
        self.begin_command(vmm);
    }

    fn serve_command(&mut self, vmm: usize, command: Command, asker: Option<Asker>) {
        self.trace.note(self.clock.now(), || format!("VMM {vmm} does {command:?}"));
        let answer = self.carry_out(vmm, command, asker);
        if let Some(asker) = asker {
            self.answer(asker, answer);
        }
    }

    fn carry_out(&mut self, vmm: usize, command: Command, asker: Option<Asker>) -> Answer {
        let now = self.clock.now();
        let fails = self.troubled() && self.dice.permille(self.plan.vmm_refuses);
        let told = &mut self.vmms[vmm];
        match command {
            Command::Track => told.memory.track(),
            Command::StopTracking => (told.memory.tracker, told.stun) = (None, None),
            Command::Protect(pages) => told.memory.protect(pages),
            Command::Harvest | Command::Stun(_) => {
                if let Command::Stun(rate) = command {
                    let (bucket, around) = (TokenBucket::new(rate, now), FaultAround::default());
                    told.stun = Some(Stun { bucket, around });
                }
                if let Some(asker) = asker {
                    self.harvest(vmm, asker);
                }
            }
            Command::Pause { longest } => {
                if told.state != State::Running || fails {
                    return Answer::Failed;
                }
                told.pause += 1;
                let pause = told.pause;
                self.set_state(vmm, State::Paused);
                self.clock.after(longest, Event::PauseEnds { vmm, pause });
                self.paused(vmm);
            }
            Command::Save => self.device_writes(vmm),
            Command::OpenMemory => (told.memory.waits, told.keeps) = (true, true),
            Command::ReopenMemory if !told.keeps => return Answer::Failed,
            Command::ReopenMemory => {}
            Command::Load => {
                if told.state != State::Incoming || fails {
                    return Answer::Failed;
                }
                self.set_state(vmm, State::Loaded);
            }
            Command::Prepare(bond) => told.bond = Some(bond),
            Command::Relinquish(bond) => {
                if told.state != State::Paused {
                    return Answer::Failed;
                }
                told.bond = Some(bond);
                self.set_state(vmm, State::Relinquished);
            }
            Command::Resume => match told.state {
                State::Running => {}
                State::Incoming | State::Ended => {
                    self.violated(format!("VMM {vmm} was told to run a guest that it does not have"));
                }
                State::Loaded | State::Paused | State::Relinquished => {
                    if fails {
                        told.told_to_run = told.state != State::Loaded;
                        return Answer::Failed;
                    }
                    self.runs(vmm);
                }
            },
            Command::Discard => self.end_vmm(vmm),
        }
        Answer::Done
    }

    /// What device models write while they come to rest and are saved.
    fn device_writes(&mut self, vmm: usize) {
        for _ in 0..self.dice.below(self.plan.device_writes + 1) {
            let page = self.dice.below(self.plan.pages);
            self.write_page(vmm, page);
        }
    }

    fn answer(&mut self, asker: Asker, answer: Answer) {
        let Asker { host, migration, ticket, .. } = asker;
        self.wake_now(host, Wake::Answered { migration, ticket, answer });
    }

    pub(crate) fn set_state(&mut self, vmm: usize, state: State) {
        self.vmms[vmm].state = state;
        self.check_owners();
    }

    /// The guest begins or goes on to run in this VMM.
    fn runs(&mut self, vmm: usize) {
        let told = &mut self.vmms[vmm];
        told.bond = None;
        self.set_state(vmm, State::Running);
        self.check_start(vmm);
        self.began_to_run(vmm);
    }

    /// The VMM ends a pause by itself, if it is still the same one, and if it is one that does.
    pub(crate) fn pause_ends(&mut self, vmm: usize, pause: u64) {
        let told = &self.vmms[vmm];
        if told.pause == pause && told.may_resume_alone(self.plan.linked) {
            self.trace.note(self.clock.now(), || format!("VMM {vmm} resumes by itself"));
            self.runs(vmm);
        }
    }

    /// The connection of a VMM to its daemon ends, at the VMM's end.
    pub(crate) fn disconnect(&mut self, vmm: usize, daemon_lives: bool) {
        let host = self.vmms[vmm].host;
        if self.vmms[vmm].attached.take().is_none() {
            return;
        }
        let mut commands = std::mem::take(&mut self.vmms[vmm].commands);
        self.vmms[vmm].serial += 1;
        let heard = commands.front().cloned();
        for (_, asker) in commands.drain(..).filter(|_| daemon_lives) {
            self.answer(asker, Answer::Gone);
        }
        // What it was at it may have done.
        if let Some((command, _)) = heard
            && self.vmms[vmm].state != State::Ended
            && self.dice.permille(500)
        {
            self.serve_command(vmm, command, None);
        }
        let told = &mut self.vmms[vmm];
        (told.stun, told.memory.tracker) = (None, None);
        // No guest has arrived whose pages could be missing. Otherwise the VMM's copy of the userfaultfd keeps accesses
        // waiting.
        if told.state == State::Incoming {
            (told.memory.waits, told.keeps) = (false, false);
        }
        if told.may_resume_alone(self.plan.linked) {
            let (pause, wait) = (told.pause, self.dice.about(self.plan.command_time, 50));
            self.clock.after(wait, Event::PauseEnds { vmm, pause });
        }
        if daemon_lives {
            let wake = match self.vmms[vmm].state {
                State::Ended => Wake::VmmEnded { vmm },
                _ => Wake::VmmLost { vmm, attachment: self.vmms[vmm].attachment },
            };
            // A VMM that ends closes its connections a little earlier.
            let wait = self.dice.time(Duration::from_millis(1), Duration::from_millis(200));
            self.wake_after(host, wait, wake);
        }
    }

    /// The VMM connects to its daemon, if there is one.
    pub(crate) fn attach(&mut self, vmm: usize) {
        let Vmm { host, state, attached, .. } = self.vmms[vmm];
        if state == State::Ended || attached.is_some() || self.hosts[host].daemon.is_none() {
            return;
        }
        if self.is_hanging(vmm) {
            return self.clock.after(HANGING, Event::Attach { vmm });
        }
        // One that has lost its daemon in a pause goes on before anything else.
        if self.vmms[vmm].may_resume_alone(self.plan.linked) {
            self.runs(vmm);
        }
        self.vmms[vmm].attached = Some(self.hosts[host].epoch);
        self.vmms[vmm].attachment += 1;
        self.wake_now(host, Wake::VmmAttached { vmm });
    }

    /// The main loop of a QEMU may touch a page that is missing, while no daemon can bring it.
    pub(crate) fn hang(&mut self, vmm: usize) {
        let Vmm { memory, state, host, .. } = &self.vmms[vmm];
        let known = self.hosts[*host].journal.values().any(|(.., of)| *of == vmm);
        let may_hang = !self.plan.linked && memory.waits && *state != State::Ended && known;
        if !may_hang || self.dice.permille(500) {
            return;
        }
        let holes: Vec<u64> = (0..self.plan.pages).filter(|page| memory.is_hole(*page)).collect();
        if !holes.is_empty() {
            self.vmms[vmm].hangs = Some(self.dice.pick(&holes));
        }
    }

    /// Tells whether a QEMU hangs. What the model leaves out about that is in the crate's documentation.
    fn is_hanging(&self, vmm: usize) -> bool {
        let Vmm { memory, hangs, .. } = &self.vmms[vmm];
        hangs.is_some_and(|page| memory.access(page) == Access::Waits)
    }

    /// The VMM's process ends.
    pub(crate) fn end_vmm(&mut self, vmm: usize) {
        if self.vmms[vmm].state == State::Ended {
            return;
        }
        self.trace.note(self.clock.now(), || format!("VMM {vmm} ends, {:?}", self.vmms[vmm].state));
        let host = self.vmms[vmm].host;
        let away = self.vmms[vmm].attached.is_none();
        self.set_state(vmm, State::Ended);
        self.disconnect(vmm, true);
        if away {
            self.wake_now(host, Wake::VmmEnded { vmm });
        }
    }

    /// The VMM's process is killed, by no daemon.
    pub(crate) fn kill_vmm(&mut self, vmm: usize) {
        if let Some(loss) = self.loss_of(vmm) {
            self.losses.push(loss);
        }
        self.end_vmm(vmm);
    }

    /// Tells whether this record of a migration of the VMM is in the journal, or on its way there.
    fn is_noted(&self, vmm: usize, record: Record) -> bool {
        let host = &self.hosts[self.vmms[vmm].host];
        let entries = host.journal.values().chain(host.writing.values().flatten());
        entries.into_iter().any(|(noted, _, of)| *noted == record && *of == vmm)
    }

    /// Returns what is lost if this VMM ends now.
    fn loss_of(&self, vmm: usize) -> Option<Loss> {
        let told = &self.vmms[vmm];
        let runs_elsewhere = self.vmms.iter().any(|other| other.state == State::Running);
        match told.state {
            State::Running => Some(Loss::VmmOfGuest),
            // Told to run or about to be, and a restarted daemon does not know more.
            State::Loaded if told.told_to_run || self.is_noted(vmm, Record::Running) => {
                Some(Loss::VmmOfGuest)
            }
            State::Paused => Some(Loss::VmmOfGuest),
            State::Relinquished if runs_elsewhere => {
                let keeps = self.hosts[told.host].daemon.as_ref().is_some_and(|daemon| {
                    daemon.sessions.values().any(|session| session.vmm == vmm && session.serving.is_some())
                });
                let fetches = self.vmms.iter().any(|other| other.memory.waits);
                (fetches && !keeps).then_some(Loss::MemoryAtSource)
            }
            State::Relinquished => {
                let committed = self.is_noted(vmm, Record::Committed);
                let fetches = self.vmms.iter().any(|other| other.memory.waits);
                Some(if committed && !fetches { Loss::VmmOfSourceAfterCommit } else { Loss::VmmOfGuest })
            }
            _ => None,
        }
    }
}

/// Returns the command for an action of the handover.
pub(crate) fn command_for(action: Action, bond: Bond) -> Command {
    match action {
        Action::Relinquish => Command::Relinquish(bond),
        Action::Resume => Command::Resume,
        _ => Command::Discard,
    }
}

impl World {
    /// Adds what was written to the pages that the asker's lanes are to send.
    fn harvest(&mut self, vmm: usize, asker: Asker) {
        let Self { hosts, vmms, .. } = self;
        let daemon = hosts[asker.host].daemon.as_mut();
        let sender = daemon.and_then(|daemon| daemon.sessions.get_mut(&asker.migration)?.sender_mut());
        let Some(sender) = sender else { return };
        let lanes_lost = sender.lanes_lost > 0;
        if self.plant == Plant::HarvestLostAfterLane && lanes_lost {
            let nowhere = memlane_protocol::PageSet::new(self.plan.pages);
            sender.harvested = vmms[vmm].memory.harvest(&nowhere);
            return;
        }
        sender.harvested = vmms[vmm].memory.harvest(&sender.outbound.dirty);
    }
}
