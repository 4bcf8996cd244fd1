//! The plan of a round: all of it follows from the seed and the round's number.

use std::fmt;
use std::time::Duration;

use memlane_lab::HostId;

use crate::common::dice::Dice;

/// The plan of a round.
#[derive(Clone, Debug)]
pub(crate) struct RoundPlan {
    /// The number of the round, from 0.
    pub round: u64,
    /// The host on which the guest is at first.
    pub from: HostId,
    /// The time at which the guest's memory is sent.
    pub mode: MoveMode,
    /// The machine that runs the guest, and the way in which its writes are found.
    pub guest: GuestSetup,
    /// The number of the guest's vCPUs.
    pub vcpus: u16,
    /// Whether digests are compared in the pause.
    pub verify: bool,
    /// The kind of the hosts.
    pub hosts: HostsKind,
    /// Whether the guest is moved once more in the end, without any strike.
    pub again: bool,
    /// The strikes, in this order.
    pub strikes: Vec<Strike>,
}

/// The kind of the hosts of a round. Hosts of one kind serve one round after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostsKind {
    /// Whether daemons run as the unit's user, with its capabilities, instead of root.
    pub unit: bool,
    /// Whether messages between the daemons take some time, which makes each step of the handover longer.
    pub far: bool,
}

/// The time at which the guest's memory is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MoveMode {
    /// The memory is sent before the guest runs at its destination.
    Precopy,
    /// The memory is sent before, of a guest that writes faster than the ports carry and is slowed.
    Stun,
    /// The guest runs at its destination after one round, and the rest of its memory follows.
    Hybrid,
    /// The guest runs at its destination at once, and all its memory follows.
    Postcopy,
}

/// The machine that runs the guest, and the way in which its writes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuestSetup {
    /// KVM runs the guest, and its log finds the writes.
    Log,
    /// KVM runs the guest, and its dirty rings find the writes.
    Ring,
    /// KVM runs the guest, and page tables find the writes.
    Pagemap,
    /// Threads of a process run the guest, and page tables find the writes.
    Process,
}

/// A failure that is caused on purpose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strike {
    /// The victim of the strike.
    pub victim: Victim,
    /// The blow that hits the victim.
    pub blow: Blow,
    /// The moment from which `after` is counted.
    pub moment: StrikeMoment,
    /// The time from `moment` to the strike.
    pub after: Duration,
}

/// The process that is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Victim {
    /// The daemon of the host on which the guest is at first.
    SourceDaemon,
    /// The daemon of the host to which the guest is moved.
    DestinationDaemon,
    /// The VMM in which the guest is at first.
    SourceVmm,
    /// The VMM to which the guest is moved.
    DestinationVmm,
}

/// The blow that hits a victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blow {
    /// The victim gets SIGKILL; a daemon is started again after this time.
    Kill(Duration),
    /// The victim gets SIGSTOP, and SIGCONT after this time.
    Stop(Duration),
}

/// An event that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StrikeMoment {
    /// The order is given.
    Order,
    /// The guest is paused at its source.
    Paused,
    /// The destination's VMM has loaded its state.
    Loaded,
    /// The destination's VMM lets the guest run.
    Running,
    /// The strike before this one has been made.
    Strike,
}

impl Victim {
    /// All victims.
    pub(crate) const ALL: [Self; 4] =
        [Self::SourceDaemon, Self::DestinationDaemon, Self::SourceVmm, Self::DestinationVmm];

    /// Returns whether the victim is a daemon.
    pub(crate) fn is_daemon(self) -> bool {
        matches!(self, Self::SourceDaemon | Self::DestinationDaemon)
    }
}

impl MoveMode {
    /// Returns whether the guest may run at its destination without all of its memory.
    pub(crate) fn is_postcopy(self) -> bool {
        matches!(self, Self::Hybrid | Self::Postcopy)
    }
}

impl RoundPlan {
    /// Makes the plan of a round. Without KVM every guest is a process.
    pub(crate) fn new(seed: u64, round: u64, kvm: bool) -> Self {
        let mut dice = Dice::of_round(seed, round);
        let from = dice.pick(&[HostId::A, HostId::B]);
        let mode = dice.weighed(&[
            (40, MoveMode::Precopy),
            (8, MoveMode::Stun),
            (22, MoveMode::Hybrid),
            (30, MoveMode::Postcopy),
        ]);
        let guest = dice.weighed(&[
            (30, GuestSetup::Log),
            (25, GuestSetup::Ring),
            (20, GuestSetup::Pagemap),
            (25, GuestSetup::Process),
        ]);
        let guest = if kvm { guest } else { GuestSetup::Process };
        let vcpus = dice.pick(&[1, 2]);
        let verify = dice.percent(30) && mode == MoveMode::Precopy;
        let hosts = HostsKind { unit: round % 2 == 1, far: dice.percent(50) };
        let again = dice.percent(25);
        let mut strikes = vec![Strike::first(&mut dice, mode)];
        if dice.percent(30) {
            strikes.push(Strike::second(&mut dice));
        }
        Self { round, from, mode, guest, vcpus, verify, hosts, again, strikes }
    }

    /// Returns the host to which the guest is moved.
    pub(crate) fn to(&self) -> HostId {
        self.from.other()
    }

    /// Returns the name of the guest.
    pub(crate) fn name(&self) -> String {
        format!("t{}", self.round)
    }

    /// Returns the arguments of the guest's VMM.
    pub(crate) fn guest_arguments(&self) -> Vec<String> {
        let guest = match self.guest {
            GuestSetup::Log => "--tracker log",
            GuestSetup::Ring => "--tracker ring",
            GuestSetup::Pagemap => "--tracker pagemap",
            GuestSetup::Process => "--guest process",
        };
        let work = match self.mode {
            MoveMode::Stun => "--working-set 24MiB --flat-out",
            MoveMode::Precopy => "--working-set 8MiB --rate 2000",
            MoveMode::Hybrid | MoveMode::Postcopy => "--working-set 48MiB --rate 8000",
        };
        let line = format!(
            "--ram 64MiB --vcpus {} {guest} {work} --fill zero=20,random=60,compressible=20 --seed {}",
            self.vcpus,
            self.round + 1
        );
        line.split_whitespace().map(str::to_owned).collect()
    }

    /// Returns the arguments of `memlanectl migrate` after the guest and the host.
    pub(crate) fn order_arguments(&self) -> Vec<&'static str> {
        let mut words = vec!["--downtime-limit", "5s", "--min-bandwidth", "1mbit"];
        words.extend(match self.mode {
            MoveMode::Precopy => &[][..],
            MoveMode::Stun => &["--converge", "stun", "--max-stun", "99"],
            MoveMode::Hybrid => &["--postcopy", "hybrid"],
            MoveMode::Postcopy => &["--postcopy", "now"],
        });
        if self.verify {
            words.push("--verify");
        }
        words
    }
}

impl Strike {
    fn first(dice: &mut Dice, mode: MoveMode) -> Self {
        let victim = dice.pick(&Victim::ALL);
        let blow = Blow::new(dice, victim);
        // The pause and the handover are short, and most that can go wrong goes wrong there.
        let weights = if mode.is_postcopy() { [15, 10, 25, 50] } else { [25, 20, 35, 20] };
        let moments =
            [StrikeMoment::Order, StrikeMoment::Paused, StrikeMoment::Loaded, StrikeMoment::Running];
        let [order, paused, loaded, running] = std::array::from_fn(|at| (weights[at], moments[at]));
        let moment = dice.weighed(&[order, paused, loaded, running]);
        let short = Duration::from_micros(100);
        let after = match moment {
            StrikeMoment::Order => dice.up_to(Duration::from_millis(600)),
            StrikeMoment::Running if mode.is_postcopy() => dice.between(short, Duration::from_millis(1000)),
            _ => dice.between(short, Duration::from_millis(60)),
        };
        Self { victim, blow, moment, after }
    }

    fn second(dice: &mut Dice) -> Self {
        let victim = dice.pick(&Victim::ALL);
        let blow = Blow::new(dice, victim);
        let after = dice.between(Duration::from_micros(500), Duration::from_secs(3));
        Self { victim, blow, moment: StrikeMoment::Strike, after }
    }
}

impl Blow {
    fn new(dice: &mut Dice, victim: Victim) -> Self {
        if dice.percent(20) {
            return Self::Stop(dice.between(Duration::from_millis(50), Duration::from_secs(4)));
        }
        let away = match victim.is_daemon() {
            true => dice.between(Duration::from_millis(10), Duration::from_secs(3)),
            // VMMs stay away.
            false => Duration::ZERO,
        };
        Self::Kill(away)
    }
}

impl fmt::Display for RoundPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = if self.hosts.unit { "unit" } else { "root" };
        let far = if self.hosts.far { "far" } else { "near" };
        let guest = format!("{:?}", self.guest).to_lowercase();
        write!(f, "{:8} {guest:7} {user} {far:4}", self.mode.as_str())?;
        if self.verify {
            f.write_str(" verify")?;
        }
        Ok(())
    }
}

impl MoveMode {
    /// Returns the name of the victim, for people and for JSON.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Stun => "stun",
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
        }
    }
}

impl Victim {
    /// Returns the name of the mode, for people and for JSON.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::SourceDaemon => "source daemon",
            Self::DestinationDaemon => "destination daemon",
            Self::SourceVmm => "source VMM",
            Self::DestinationVmm => "destination VMM",
        }
    }
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(Duration::ZERO) => f.write_str("killed"),
            Self::Kill(away) => write!(f, "killed for {away:.0?}"),
            Self::Stop(away) => write!(f, "stopped for {away:.0?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_cover_every_victim_moment_mode_and_guest() {
        let plans: Vec<RoundPlan> = (0..400).map(|round| RoundPlan::new(1, round, true)).collect();
        let has = |what: &dyn Fn(&RoundPlan) -> bool| plans.iter().filter(|plan| what(plan)).count() > 10;
        for victim in Victim::ALL {
            for moment in
                [StrikeMoment::Order, StrikeMoment::Paused, StrikeMoment::Loaded, StrikeMoment::Running]
            {
                let first = |plan: &RoundPlan| (plan.strikes[0].victim, plan.strikes[0].moment);
                assert!(has(&|plan| first(plan) == (victim, moment)), "{victim:?} {moment:?}");
            }
        }
        for mode in [MoveMode::Precopy, MoveMode::Stun, MoveMode::Hybrid, MoveMode::Postcopy] {
            assert!(has(&|plan| plan.mode == mode), "{mode:?}");
        }
        for guest in [GuestSetup::Log, GuestSetup::Ring, GuestSetup::Pagemap, GuestSetup::Process] {
            assert!(has(&|plan| plan.guest == guest), "{guest:?}");
        }
        assert!(has(&|plan| plan.strikes.len() == 2) && has(&|plan| plan.again) && has(&|plan| plan.verify));
        assert!(plans.iter().all(|plan| plan.hosts.unit == (plan.round % 2 == 1)));
        assert!((0..400).all(|round| RoundPlan::new(1, round, false).guest == GuestSetup::Process));
    }
}
