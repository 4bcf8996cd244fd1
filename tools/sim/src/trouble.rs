//! What goes wrong: drawn again and again until everything is calm.

use std::time::Duration;

use crate::event::{Event, HostId};
use crate::network::Purpose;
use crate::session::{Input, Session};
use crate::swarm::LEAST_RATE;
use crate::vmm::State;
use crate::world::World;

/// A kind of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    LaneReset,
    ControlReset,
    AnyReset,
    PortCut,
    ControlCut,
    AllCut,
    RateChange,
    CrashOfSource,
    CrashOfDestination,
    CrashWhileFetching,
    StandStill,
    VmmDisconnect,
    VmmEnd,
    Cancel,
    Abandon,
}

/// Something goes wrong, at a host if it is one that has a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trouble {
    kind: Kind,
    host: HostId,
}

impl Kind {
    pub(crate) const ALL: [Self; 15] = [
        Self::LaneReset,
        Self::ControlReset,
        Self::AnyReset,
        Self::PortCut,
        Self::ControlCut,
        Self::AllCut,
        Self::RateChange,
        Self::CrashOfSource,
        Self::CrashOfDestination,
        Self::CrashWhileFetching,
        Self::StandStill,
        Self::VmmDisconnect,
        Self::VmmEnd,
        Self::Cancel,
        Self::Abandon,
    ];

    /// Returns how much rarer than others it is: what ends a guest would leave nothing to look at.
    fn rarity(self) -> u64 {
        match self {
            Self::VmmEnd | Self::Abandon => 20,
            Self::Cancel | Self::AllCut => 6,
            Self::CrashOfSource | Self::CrashOfDestination => 3,
            Self::StandStill | Self::ControlCut | Self::VmmDisconnect => 4,
            _ => 1,
        }
    }
}

impl World {
    /// Tells whether things may still go wrong.
    pub(crate) fn troubled(&self) -> bool {
        !self.calm && self.clock.now() < self.plan.calm_at
    }

    /// Draws some trouble, and when the next is drawn.
    pub(crate) fn draw_trouble(&mut self) {
        if !self.troubled() || self.plan.troubles.is_empty() {
            return;
        }
        let wait = self.dice.time(Duration::ZERO, 2 * self.plan.trouble_pause);
        self.clock.after(wait, Event::DrawTrouble);
        self.some_trouble(Duration::ZERO);
    }

    /// Trouble may meet what is just being done.
    pub(crate) fn ambush(&mut self) {
        let cases = self.plan.ambush_permille;
        if cases > 0 && self.troubled() && !self.plan.troubles.is_empty() && self.dice.permille(cases) {
            let most = 2 * self.plan.sync_time;
            let wait = self.dice.time(Duration::ZERO, most);
            self.some_trouble(wait);
        }
    }

    fn some_trouble(&mut self, wait: Duration) {
        let kind = self.dice.pick(&self.plan.troubles);
        if self.dice.below(kind.rarity()) == 0 {
            let host = self.dice.below(2) as HostId;
            self.clock.after(wait, Event::Trouble(Trouble { kind, host }));
        }
    }

    /// Has something go wrong.
    pub(crate) fn go_wrong(&mut self, Trouble { kind, host }: Trouble) {
        if !self.troubled() {
            return;
        }
        self.trace.note(self.clock.now(), || format!("trouble at host {host}: {kind:?}"));
        self.tally.troubles += 1;
        match kind {
            Kind::LaneReset => self.reset_one(|purpose| {
                matches!(purpose, Purpose::Lane { .. } | Purpose::FetchLane { .. } | Purpose::Faults { .. })
            }),
            Kind::ControlReset => self.reset_one(|purpose| matches!(purpose, Purpose::Control(_))),
            Kind::AnyReset => self.reset_one(|_| true),
            Kind::PortCut => {
                let path = 1 + self.dice.below(self.network.paths.len() as u64 - 1) as usize;
                self.cut(path);
            }
            Kind::ControlCut => self.cut(0),
            Kind::AllCut => (0..self.network.paths.len()).for_each(|path| self.cut(path)),
            Kind::RateChange => {
                let path = self.dice.below(self.network.paths.len() as u64) as usize;
                self.network.paths[path].rate = self.dice.scale(LEAST_RATE, 200_000_000);
            }
            Kind::CrashOfSource | Kind::CrashOfDestination => {
                let is_source = kind == Kind::CrashOfSource;
                if let Some(at) = self.host_with(is_source) {
                    self.crash(at);
                }
            }
            Kind::CrashWhileFetching => {
                let fetches = |session: &Session| session.postcopy.fetching.is_some();
                if let Some(at) = self.host_where(fetches) {
                    self.crash(at);
                }
            }
            Kind::StandStill => self.stand_still(host),
            Kind::VmmDisconnect => self.disconnect_one(host),
            Kind::VmmEnd => {
                let living =
                    |vmm: &usize| self.vmms[*vmm].host == host && self.vmms[*vmm].state != State::Ended;
                if let Some(vmm) = (0..self.vmms.len()).rev().find(living) {
                    self.kill_vmm(vmm);
                }
            }
            Kind::Cancel => self.ask_all(true, || Input::Cancel),
            Kind::Abandon => {
                let source = host == 0;
                self.ask_all(source, || Input::Abandon);
            }
        }
    }

    /// Returns the host that has the source's, or the destination's, part in a migration.
    fn host_with(&self, is_source: bool) -> Option<HostId> {
        self.host_where(|session| session.machine.is_source() == is_source)
    }

    fn host_where(&self, concerned: impl Fn(&Session) -> bool) -> Option<HostId> {
        (0..2).find(|host| {
            let daemon = self.hosts[*host].daemon.as_ref();
            daemon.is_some_and(|daemon| daemon.sessions.values().any(&concerned))
        })
    }

    fn ask_all(&mut self, is_source: bool, input: impl Fn() -> Input) {
        let Some(at) = self.host_with(is_source) else { return };
        let Some(daemon) = &self.hosts[at].daemon else { return };
        let migrations: Vec<_> = daemon.sessions.keys().copied().collect();
        for migration in migrations {
            self.with_session(at, migration, |_, session| session.input(input()));
        }
    }

    /// Resets a connection. Its two ends learn of it at different times.
    fn reset_one(&mut self, concerned: impl Fn(Purpose) -> bool) {
        const APART: Duration = Duration::from_millis(1000);
        let connections = self.network.connections.iter().enumerate();
        let open: Vec<usize> = connections
            .filter(|(_, it)| (it.open[0] || it.open[1]) && concerned(it.purpose))
            .map(|(index, _)| index)
            .collect();
        if open.is_empty() {
            return;
        }
        let connection = self.dice.pick(&open);
        let dialler = self.network.connections[connection].dialler;
        let mut waits = [Duration::ZERO, APART].map(|least| self.dice.time(least / 2, APART));
        if self.dice.permille(400) {
            // What was sent is held up on its way, and arrives when the sender has long begun to send it again.
            let path = self.network.connections[connection].path;
            let held_up = self.clock.now() + self.dice.time(APART / 20, APART / 2);
            let cut_until = &mut self.network.paths[path].cut_until[1 - dialler];
            *cut_until = held_up.max(*cut_until).min(self.plan.calm_at);
            waits[0] = self.dice.time(Duration::ZERO, APART / 50);
        }
        for (at, wait) in [dialler, 1 - dialler].into_iter().zip(waits) {
            self.clock.after(wait, Event::Reset { connection, at });
        }
    }

    fn cut(&mut self, path: usize) {
        let longest = self.dice.pick(&[50, 500, 3000, 12_000]);
        for to in 0..2 {
            let wait = self.dice.time(Duration::ZERO, Duration::from_millis(longest));
            let until = (self.clock.now() + wait).min(self.plan.calm_at);
            self.network.paths[path].cut_until[to] = until;
        }
    }

    fn stand_still(&mut self, at: HostId) {
        if self.hosts[at].daemon.is_none() || self.hosts[at].stands_still.is_some() {
            return;
        }
        let longest = self.dice.pick(&[20, 300, 6000]);
        let wait = self.dice.time(Duration::ZERO, Duration::from_millis(longest));
        let until = (self.clock.now() + wait).min(self.plan.calm_at);
        self.hosts[at].stands_still = Some(until);
        self.hosts[at].stood_still = Some(until);
        self.clock.at(until, Event::GoOn(at));
    }

    fn disconnect_one(&mut self, host: HostId) {
        let attached = |vmm: &usize| self.vmms[*vmm].host == host && self.vmms[*vmm].attached.is_some();
        let Some(vmm) = (0..self.vmms.len()).rev().find(attached) else { return };
        self.disconnect(vmm, true);
        let wait = self.dice.time(Duration::from_millis(250), Duration::from_secs(2));
        self.clock.after(wait, Event::Attach { vmm });
    }
}
