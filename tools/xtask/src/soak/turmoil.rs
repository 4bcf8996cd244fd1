//! Troubles under way: they begin when their time has come, and are mended when it is over.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use memlane_lab::{HostId, Rate, Rig};
use rustix::process::Signal;

use super::fleet::PORT_RATE;
use super::trouble::{PORTS, PlannedTrouble, Side, Trouble};
use crate::common::order::MigrateCommand;
use crate::common::signal::signal;

/// Longest time that a daemon may take to end once it was told to, on a machine that is busy with other things. It waits for 5
/// seconds by itself.
const END: Duration = Duration::from_secs(30);

/// The troubles of a step.
pub(crate) struct Turmoil {
    /// The host from which the first guest of the step goes.
    pub from: HostId,
    /// The name of that guest.
    guest: String,
    planned: Vec<PlannedTrouble>,
    mend: Vec<(Instant, Mend)>,
    /// The troubles that came.
    pub made: Vec<MadeTrouble>,
    /// What an operator asked meanwhile.
    pub asked: Vec<OperatorCommand>,
    /// Other things that must not happen, as they were seen.
    pub oddities: Vec<String>,
    /// The time of the last trouble or of the last mend.
    pub last: Instant,
}

/// A trouble that came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MadeTrouble {
    /// The trouble.
    pub trouble: Trouble,
    /// Whether an order was under way.
    pub under_way: bool,
}

/// Something that an operator asked while an order was under way.
pub(crate) struct OperatorCommand {
    /// The trouble that it is.
    pub trouble: Trouble,
    /// The command.
    pub command: MigrateCommand,
}

/// What mends a trouble.
enum Mend {
    Start(HostId),
    /// Start the daemon so long after it has ended; it was told to end at this time.
    StartAfterEnd(HostId, Duration, Instant),
    Continue(HostId),
    Control,
    PortSilent(usize),
    PortDown(usize, HostId),
    PortBad(usize),
    PortSlow(usize),
    All,
}

impl Turmoil {
    /// Prepares the troubles of a step that moves `guest` away from a host.
    pub(crate) fn new(guest: &str, from: HostId, planned: Vec<PlannedTrouble>) -> Self {
        Self {
            from,
            guest: guest.to_owned(),
            planned,
            mend: Vec::new(),
            made: Vec::new(),
            asked: Vec::new(),
            oddities: Vec::new(),
            last: Instant::now(),
        }
    }

    /// Begins and mends what is due; returns whether all is over. `given` is when the orders were given, and `under_way` says
    /// whether one of them still is.
    ///
    /// # Errors
    ///
    /// If the harness itself fails.
    pub(crate) fn turn(&mut self, rig: &mut Rig, given: Instant, under_way: bool) -> Result<bool> {
        while let Some(planned) = self.planned.first().copied()
            && given.elapsed() >= planned.after
        {
            self.planned.remove(0);
            self.begin(rig, planned.trouble, under_way)
                .with_context(|| format!("having something go wrong: {}", planned.trouble))?;
        }
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.mend).into_iter().partition(|(when, _)| *when <= now);
        self.mend = later;
        let due: Vec<(Instant, Mend)> = due;
        for (_, mend) in due {
            self.mend(rig, mend).context("mending what went wrong")?;
            self.last = Instant::now();
        }
        let mut asking = false;
        for asked in &mut self.asked {
            asking |= !asked.command.has_ended()?;
        }
        Ok(self.planned.is_empty() && self.mend.is_empty() && !asking)
    }

    fn host(&self, side: Side) -> HostId {
        match side {
            Side::Source => self.from,
            Side::Destination => self.from.other(),
        }
    }

    fn begin(&mut self, rig: &mut Rig, trouble: Trouble, under_way: bool) -> Result<()> {
        let mend = match trouble {
            Trouble::DaemonKilled { side, away } => {
                let id = self.host(side);
                rig.daemon(id).kill().context("killing a daemon")?;
                Some((away, Mend::Start(id)))
            }
            Trouble::DaemonRestarted { side, away } => {
                let id = self.host(side);
                rig.daemon(id).terminate()?;
                Some((Duration::ZERO, Mend::StartAfterEnd(id, away, Instant::now())))
            }
            Trouble::DaemonStopped { side, away } => {
                let id = self.host(side);
                signal(rig.daemon(id), Signal::STOP);
                Some((away, Mend::Continue(id)))
            }
            Trouble::KeysRenewed { side } => {
                let id = self.host(side);
                rig.renew_keys(id)?;
                signal(rig.daemon(id), Signal::HUP);
                None
            }
            Trouble::ControlCut { away } => {
                rig.lab().silence_control(true)?;
                Some((away, Mend::Control))
            }
            Trouble::PortSilent { port, away } => {
                rig.lab().silence_port(port, true)?;
                Some((away, Mend::PortSilent(port)))
            }
            Trouble::PortDown { port, side, away } => {
                let id = self.host(side);
                rig.lab().host(id).port_down(port)?;
                Some((away, Mend::PortDown(port, id)))
            }
            Trouble::PortBad { port, percent, delay, away } => {
                rig.lab().set_port_quality(port, delay, f64::from(percent) / 100.0)?;
                Some((away, Mend::PortBad(port)))
            }
            Trouble::PortSlow { port, away } => {
                rig.lab().set_port_rate(port, Some(Rate::from_bits_per_second(PORT_RATE / 10)))?;
                Some((away, Mend::PortSlow(port)))
            }
            Trouble::AllCut { away } => {
                rig.lab().silence_control(true)?;
                (0..PORTS).try_for_each(|port| rig.lab().silence_port(port, true))?;
                Some((away, Mend::All))
            }
            // What has ended is neither cancelled nor in the way of another order.
            Trouble::Cancel | Trouble::SecondOrder { .. } if !under_way => return Ok(()),
            Trouble::Cancel => {
                let command = MigrateCommand::give(rig, self.from, &["cancel", &self.guest])?;
                self.asked.push(OperatorCommand { trouble, command });
                None
            }
            Trouble::SecondOrder { side } => {
                let at = self.host(side);
                let to = rig.lab().host(at.other()).name().to_owned();
                let words =
                    ["migrate", &self.guest, &to, "--downtime-limit", "60s", "--min-bandwidth", "1mbit"];
                let command = MigrateCommand::give(rig, at, &words)?;
                self.asked.push(OperatorCommand { trouble, command });
                None
            }
        };
        self.made.push(MadeTrouble { trouble, under_way });
        self.last = Instant::now();
        self.mend.extend(mend.map(|(after, mend)| (self.last + after, mend)));
        Ok(())
    }

    fn mend(&mut self, rig: &mut Rig, mend: Mend) -> Result<()> {
        match mend {
            Mend::Start(id) => rig.start_daemon_unattended(id),
            Mend::StartAfterEnd(id, away, told) => {
                if rig.daemon(id).is_running() && told.elapsed() < END {
                    let soon = Instant::now() + Duration::from_millis(5);
                    self.mend.push((soon, Mend::StartAfterEnd(id, away, told)));
                    return Ok(());
                }
                if rig.daemon(id).is_running() {
                    let host = rig.lab().host(id).name();
                    self.oddities
                        .push(format!("memlaned at {host} was told to end, and has not within {END:?}"));
                }
                self.mend.push((Instant::now() + away, Mend::Start(id)));
                Ok(())
            }
            Mend::Continue(id) => {
                signal(rig.daemon(id), Signal::CONT);
                Ok(())
            }
            Mend::Control => rig.lab().silence_control(false),
            Mend::PortSilent(port) => rig.lab().silence_port(port, false),
            Mend::PortDown(port, id) => rig.lab().host(id).port_up(port),
            Mend::PortBad(port) => rig.lab().set_port_quality(port, Duration::ZERO, 0.0),
            Mend::PortSlow(port) => {
                rig.lab().set_port_rate(port, Some(Rate::from_bits_per_second(PORT_RATE)))
            }
            Mend::All => {
                rig.lab().silence_control(false)?;
                (0..PORTS).try_for_each(|port| rig.lab().silence_port(port, false))
            }
        }
    }
}
