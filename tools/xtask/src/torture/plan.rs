//! What is done in a round: all of it follows from the seed and the round's number.

use std::fmt;
use std::time::Duration;

use memlane_lab::HostId;

use super::dice::Dice;

/// A round.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its number, from 0.
    pub round: u64,
    /// Where the guest is at first.
    pub from: HostId,
    /// When its memory is sent.
    pub mode: Mode,
    /// What runs it, and how its writes are found.
    pub guest: Guest,
    /// Number of its vCPUs.
    pub vcpus: u16,
    /// Whether digests are compared in the pause.
    pub verify: bool,
    /// What the hosts are like.
    pub hosts: Hosts,
    /// Whether the guest is moved once more in the end, with nobody in its way.
    pub again: bool,
    /// What goes wrong, in this order.
    pub strikes: Vec<Strike>,
}

/// What the hosts of a round are like; those of one kind serve one round after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hosts {
    /// Whether daemons are of the unit's user, with its capabilities, instead of root.
    pub unit: bool,
    /// Whether words between the daemons take some time, which makes each step of the handover last as long.
    pub far: bool,
}

/// When the guest's memory is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Before the guest.
    Precopy,
    /// The same, of a guest that outruns the ports and is slowed.
    Stun,
    /// After one round.
    Hybrid,
    /// After the guest.
    Postcopy,
}

/// What runs the guest, and how its writes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// KVM, by its log.
    Log,
    /// KVM, by its rings.
    Ring,
    /// KVM, by page tables.
    Pagemap,
    /// Threads of a process, by page tables.
    Process,
}

/// Something that goes wrong.
#[derive(Clone, Copy, Debug)]
pub struct Strike {
    /// With whom.
    pub victim: Victim,
    /// What.
    pub blow: Blow,
    /// From when on the time to it is counted.
    pub moment: Moment,
    /// That time.
    pub after: Duration,
}

/// Who is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The daemon of the host that the guest is at first.
    SourceDaemon,
    /// The other one.
    DestinationDaemon,
    /// The VMM that the guest is in at first.
    SourceVmm,
    /// The other one.
    DestinationVmm,
}

/// What happens to a victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// SIGKILL; a daemon is started again after this time.
    Kill(Duration),
    /// SIGSTOP, and SIGCONT after this time.
    Stop(Duration),
}

/// Something that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The order is given.
    Order,
    /// The guest stands still at its source.
    Paused,
    /// The destination's VMM has loaded its state.
    Loaded,
    /// The destination's VMM lets it run.
    Running,
    /// The strike before this one.
    Strike,
}

impl Victim {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::SourceDaemon, Self::DestinationDaemon, Self::SourceVmm, Self::DestinationVmm];

    /// Whether it is a daemon.
    pub fn is_daemon(self) -> bool {
        matches!(self, Self::SourceDaemon | Self::DestinationDaemon)
    }
}

impl Mode {
    /// Whether the guest may run at its destination without all of its memory.
    pub fn is_postcopy(self) -> bool {
        matches!(self, Self::Hybrid | Self::Postcopy)
    }
}

impl Plan {
    /// The plan of a round. Without KVM every guest is a process.
    pub fn new(seed: u64, round: u64, kvm: bool) -> Self {
        let mut dice = Dice::of_round(seed, round);
        let from = dice.pick(&[HostId::A, HostId::B]);
        let mode =
            dice.weighed(&[(40, Mode::Precopy), (8, Mode::Stun), (22, Mode::Hybrid), (30, Mode::Postcopy)]);
        let guest =
            dice.weighed(&[(30, Guest::Log), (25, Guest::Ring), (20, Guest::Pagemap), (25, Guest::Process)]);
        let guest = if kvm { guest } else { Guest::Process };
        let vcpus = dice.pick(&[1, 2]);
        let verify = dice.percent(30) && mode == Mode::Precopy;
        let hosts = Hosts { unit: round % 2 == 1, far: dice.percent(50) };
        let again = dice.percent(25);
        let mut strikes = vec![Strike::first(&mut dice, mode)];
        if dice.percent(30) {
            strikes.push(Strike::second(&mut dice));
        }
        Self { round, from, mode, guest, vcpus, verify, hosts, again, strikes }
    }

    /// Where the guest is to go.
    pub fn to(&self) -> HostId {
        other(self.from)
    }

    /// Name of the guest.
    pub fn name(&self) -> String {
        format!("t{}", self.round)
    }

    /// What the guest's VMM is told.
    pub fn guest_arguments(&self) -> Vec<String> {
        let guest = match self.guest {
            Guest::Log => "--tracker log",
            Guest::Ring => "--tracker ring",
            Guest::Pagemap => "--tracker pagemap",
            Guest::Process => "--guest process",
        };
        let work = match self.mode {
            Mode::Stun => "--working-set 24MiB --flat-out",
            Mode::Precopy => "--working-set 8MiB --rate 2000",
            Mode::Hybrid | Mode::Postcopy => "--working-set 48MiB --rate 8000",
        };
        let line = format!(
            "--ram 64MiB --vcpus {} {guest} {work} --fill zero=20,random=60,compressible=20 --seed {}",
            self.vcpus,
            self.round + 1
        );
        line.split_whitespace().map(str::to_owned).collect()
    }

    /// What `memlanectl migrate` is told after the guest and the host.
    pub fn order_arguments(&self) -> Vec<&'static str> {
        let mut words = vec!["--downtime-limit", "5s", "--min-bandwidth", "1mbit"];
        words.extend(match self.mode {
            Mode::Precopy => &[][..],
            Mode::Stun => &["--converge", "stun", "--max-stun", "99"],
            Mode::Hybrid => &["--postcopy", "hybrid"],
            Mode::Postcopy => &["--postcopy", "now"],
        });
        if self.verify {
            words.push("--verify");
        }
        words
    }
}

impl Strike {
    fn first(dice: &mut Dice, mode: Mode) -> Self {
        let victim = dice.pick(&Victim::ALL);
        let blow = Blow::new(dice, victim);
        // The pause and the handover are short, and most that can go wrong goes wrong there.
        let weights = if mode.is_postcopy() { [15, 10, 25, 50] } else { [25, 20, 35, 20] };
        let moments = [Moment::Order, Moment::Paused, Moment::Loaded, Moment::Running];
        let [order, paused, loaded, running] = std::array::from_fn(|at| (weights[at], moments[at]));
        let moment = dice.weighed(&[order, paused, loaded, running]);
        let short = Duration::from_micros(100);
        let after = match moment {
            Moment::Order => dice.up_to(Duration::from_millis(600)),
            Moment::Running if mode.is_postcopy() => dice.between(short, Duration::from_millis(1000)),
            _ => dice.between(short, Duration::from_millis(60)),
        };
        Self { victim, blow, moment, after }
    }

    fn second(dice: &mut Dice) -> Self {
        let victim = dice.pick(&Victim::ALL);
        let blow = Blow::new(dice, victim);
        let after = dice.between(Duration::from_micros(500), Duration::from_secs(3));
        Self { victim, blow, moment: Moment::Strike, after }
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

/// The other host.
pub fn other(id: HostId) -> HostId {
    if id == HostId::A { HostId::B } else { HostId::A }
}

impl fmt::Display for Plan {
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

impl Mode {
    /// For people and for JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Stun => "stun",
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
        }
    }
}

impl Victim {
    /// For people and for JSON.
    pub fn as_str(self) -> &'static str {
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
        let plans: Vec<Plan> = (0..400).map(|round| Plan::new(1, round, true)).collect();
        let has = |what: &dyn Fn(&Plan) -> bool| plans.iter().filter(|plan| what(plan)).count() > 10;
        for victim in Victim::ALL {
            for moment in [Moment::Order, Moment::Paused, Moment::Loaded, Moment::Running] {
                let first = |plan: &Plan| (plan.strikes[0].victim, plan.strikes[0].moment);
                assert!(has(&|plan| first(plan) == (victim, moment)), "{victim:?} {moment:?}");
            }
        }
        for mode in [Mode::Precopy, Mode::Stun, Mode::Hybrid, Mode::Postcopy] {
            assert!(has(&|plan| plan.mode == mode), "{mode:?}");
        }
        for guest in [Guest::Log, Guest::Ring, Guest::Pagemap, Guest::Process] {
            assert!(has(&|plan| plan.guest == guest), "{guest:?}");
        }
        assert!(has(&|plan| plan.strikes.len() == 2) && has(&|plan| plan.again) && has(&|plan| plan.verify));
        assert!(plans.iter().all(|plan| plan.hosts.unit == (plan.round % 2 == 1)));
        assert!((0..400).all(|round| Plan::new(1, round, false).guest == Guest::Process));
    }
}
