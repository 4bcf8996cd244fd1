//! The world: everything that there is in a run, and the loop that goes from event to event.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use memlane_protocol::convergence::{Converge, Policy};
use memlane_protocol::wire::control::Control;

use crate::clock::Clock;
use crate::dice::Dice;
use crate::event::{Event, HostId, MigrationId, Wake};
use crate::guest::Vcpu;
use crate::host::Host;
use crate::invariants::Loss;
use crate::lane::Bench;
use crate::network::{Network, Payload};
use crate::plant::Plant;
use crate::report::{Run, Tally};
use crate::swarm::Plan;
use crate::trace::Trace;
use crate::vmm::{State, Vmm};

/// After all trouble has ended, everything has come to its end within this time.
const PATIENCE: Duration = Duration::from_secs(400);
/// It is looked whether it has in these intervals.
const LOOK: Duration = Duration::from_millis(500);
/// The last move is ordered so often at most.
const TRIES: u32 = 3;
/// A run that has more events than this is stuck in a circle.
const MOST_EVENTS: u64 = 20_000_000;

/// Everything in a run.
pub(crate) struct World {
    pub plan: Plan,
    pub plant: Plant,
    pub dice: Dice,
    pub clock: Clock,
    pub network: Network,
    pub hosts: [Host; 2],
    pub vmms: Vec<Vmm>,
    pub vcpus: Vec<Vcpu>,
    /// The newest version of each page that the guest has written.
    pub truth: Vec<u32>,
    pub trace: Trace,
    pub tally: Tally,
    pub violation: Option<String>,
    pub losses: Vec<Loss>,
    /// A destination has promised that the guest never ran there.
    pub declined: bool,
    /// The messages that migrations' own connections carry from each host, in their order.
    pub under_way: BTreeMap<(MigrationId, HostId), VecDeque<Vec<u8>>>,
    /// All trouble is over.
    pub calm: bool,
    pub paused_since: Option<(usize, Duration)>,
    pub next_migration: MigrationId,
    orders_left: u32,
    encore: Encore,
    tickets: u64,
}

/// The last move, which must succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encore {
    /// It is to be ordered. It has been so often, and was refused.
    Due {
        tries: u32,
    },
    Ordered {
        moved_before: u64,
        tries: u32,
    },
    Over,
}

impl World {
    pub(crate) fn new(seed: u64, plant: Plant, keep_trace: bool) -> Self {
        let mut dice = Dice::new(seed);
        let plan = Plan::draw(&mut dice);
        let mut clock = Clock::default();
        let mut guest = Vmm::new(0, State::Running, plan.pages);
        let mut truth = vec![0; plan.pages as usize];
        for place in 0..plan.filled_pages {
            let page = place * plan.stride % plan.pages;
            truth[page as usize] = 1;
            guest.memory.put(page, 1);
        }
        clock.at(Duration::ZERO, Event::Guest);
        clock.at(plan.order_pause, Event::Operator);
        clock.at(dice.time(Duration::ZERO, plan.trouble_pause), Event::DrawTrouble);
        clock.at(plan.calm_at, Event::Calm);
        let network = Network { paths: plan.paths.clone(), ..Network::default() };
        let mut trace = Trace::new(keep_trace);
        trace.note(Duration::ZERO, || format!("{plan:?}"));
        let mut world = Self {
            plant,
            dice,
            clock,
            network,
            hosts: Default::default(),
            vmms: vec![guest],
            vcpus: vec![Vcpu::default(); plan.vcpus],
            truth,
            trace,
            tally: Tally::default(),
            violation: None,
            losses: Vec::new(),
            declined: false,
            under_way: BTreeMap::new(),
            calm: false,
            paused_since: None,
            next_migration: 1,
            orders_left: plan.orders,
            encore: if plan.encore { Encore::Due { tries: 0 } } else { Encore::Over },
            tickets: 0,
            plan,
        };
        (0..2).for_each(|host| world.start_daemon(host));
        world
    }

    /// Goes on until everything has come to its end, or something is violated.
    pub(crate) fn run(mut self, seed: u64) -> Run {
        let mut events = 0;
        let mut over = false;
        while self.violation.is_none() && !over {
            let event = self.clock.next().expect("there is always a look to come");
            over = self.happen(event);
            events += 1;
            if events > MOST_EVENTS {
                self.violated(format!("{MOST_EVENTS} events, and no end"));
            }
        }
        if self.violation.is_none() {
            self.check_end();
        }
        self.tally.seeds = 1;
        self.tally.events = events;
        self.tally.virtual_time = self.clock.now();
        Run { seed, violation: self.violation, tally: self.tally, trace: self.trace.into_lines() }
    }

    /// Has an event happen. Returns whether everything has come to its end.
    fn happen(&mut self, event: Event) -> bool {
        match event {
            Event::Arrive { connection, to } => {
                let Self { network, clock, dice, .. } = self;
                if let Some(payload) = network.arrive(connection, to, (clock, dice)) {
                    self.wake(to, Wake::Heard { connection, payload });
                }
            }
            Event::Reset { connection, at } => {
                if self.network.is_open(connection, at) {
                    self.network.lose(connection, at);
                    self.wake(at, Wake::Lost { connection });
                }
            }
            Event::Guest => self.guest_runs(),
            Event::Obey { vmm, serial } => self.obey(vmm, serial),
            Event::Attach { vmm } => self.attach(vmm),
            Event::PauseEnds { vmm, pause } => self.pause_ends(vmm, pause),
            Event::Daemon { host, epoch, wake } => {
                if self.hosts[host].epoch == epoch {
                    self.wake(host, wake);
                }
            }
            Event::Trouble(trouble) => self.go_wrong(trouble),
            Event::DrawTrouble => self.draw_trouble(),
            Event::Restart(host) => self.start_daemon(host),
            Event::GoOn(host) => self.go_on(host),
            Event::Operator => self.operate(),
            Event::Calm => {
                self.trace.note(self.clock.now(), || "all trouble is over".to_owned());
                self.calm = true;
                self.clock.after(LOOK, Event::Look);
            }
            Event::Look => return self.look(),
        }
        false
    }

    /// Has a daemon do something, now or when it does not stand still any more.
    fn wake(&mut self, host: HostId, wake: Wake) {
        if self.hosts[host].stands_still.is_some() {
            self.hosts[host].waiting.push_back(wake);
        } else if self.hosts[host].daemon.is_some() {
            self.daemon_wakes(host, wake);
        }
    }

    fn go_on(&mut self, host: HostId) {
        if self.hosts[host].stands_still.is_none_or(|until| until > self.clock.now()) {
            return; // it crashed meanwhile
        }
        self.hosts[host].stands_still = None;
        for wake in std::mem::take(&mut self.hosts[host].waiting) {
            self.wake(host, wake);
        }
    }

    /// Orders a move where none is under way, as long as orders are left.
    fn operate(&mut self) {
        self.clock.after(self.plan.order_pause, Event::Operator);
        let may_order =
            if self.calm { matches!(self.encore, Encore::Due { .. }) } else { self.orders_left > 0 };
        let quiet = self.hosts.iter().all(Host::takes_orders);
        if !may_order || !quiet || self.calm && self.unfinished().is_some() {
            return;
        }
        let Some(vmm) = self.vmms.iter().position(|vmm| vmm.state == State::Running && !vmm.poisoned) else {
            return;
        };
        let from = self.vmms[vmm].host;
        self.bring_receiver(1 - from);
        if !self.order(from, vmm) {
            return;
        }
        match self.encore {
            Encore::Due { tries } if self.calm => {
                self.encore = Encore::Ordered { moved_before: self.tally.moved, tries: tries + 1 };
            }
            _ => self.orders_left -= 1,
        }
    }

    /// Makes sure that a VMM waits for the guest at a host.
    fn bring_receiver(&mut self, host: HostId) {
        let waits = self.vmms.iter().any(|vmm| vmm.host == host && vmm.state == State::Incoming);
        if !waits {
            self.vmms.push(Vmm::new(host, State::Incoming, self.plan.pages));
        }
        for vmm in self.vmms_of(host) {
            if self.vmms[vmm].state == State::Incoming {
                self.attach(vmm);
            }
        }
    }

    /// Returns what an order allows: all that helps, in the last one. Its limit is long, because a forecast remembers a
    /// pause that an outage has made long until there were other pauses.
    pub(crate) fn order_policy(&self) -> Policy {
        match self.encore {
            Encore::Ordered { .. } => Policy {
                downtime_limit: Duration::from_secs(600),
                max_iterations: 5,
                converge: Converge::Postcopy,
                max_stun_percent: 99,
                postcopy: None,
            },
            _ => self.plan.policy,
        }
    }

    /// Looks whether everything has come to its end, which it must in time.
    fn look(&mut self) -> bool {
        self.clock.after(LOOK, Event::Look);
        self.check_queues();
        let alive = self.vmms.iter().any(|vmm| vmm.state == State::Running && !vmm.poisoned);
        let ordered = !matches!(self.encore, Encore::Due { .. }) || !alive;
        let not_ordered = || (!ordered).then(|| "the last move could not be ordered".to_owned());
        if let Some(what) = self.unfinished().or_else(not_ordered) {
            if self.clock.now() > self.plan.calm_at + PATIENCE {
                self.violated(format!("{PATIENCE:?} after all trouble this has not come to its end: {what}"));
            }
            return false;
        }
        match self.encore {
            Encore::Ordered { moved_before, .. } if self.tally.moved > moved_before => {
                self.tally.encores += 1
            }
            // An offer that was given up may still have been on its way, and have taken what waits for the guest.
            Encore::Ordered { tries, .. } if tries < TRIES => {
                self.encore = Encore::Due { tries };
                return false;
            }
            Encore::Ordered { .. } => {
                self.violated(format!(
                    "all trouble is over, and the guest could not be moved in {TRIES} tries"
                ));
            }
            _ => {}
        }
        true
    }

    pub(crate) fn ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    /// Wakes a daemon at once, after what is happening now.
    pub(crate) fn wake_now(&mut self, host: HostId, wake: Wake) {
        self.wake_after(host, Duration::ZERO, wake);
    }

    /// Wakes a daemon after a while, if it still lives.
    pub(crate) fn wake_after(&mut self, host: HostId, wait: Duration, wake: Wake) {
        let epoch = self.hosts[host].epoch;
        self.clock.after(wait, Event::Daemon { host, epoch, wake });
    }

    pub(crate) fn send(&mut self, connection: usize, from: HostId, payload: Payload) {
        let Self { network, clock, dice, .. } = self;
        network.send(connection, from, payload, (clock, dice));
    }

    pub(crate) fn send_control(&mut self, connection: usize, from: HostId, message: &Control) {
        self.send(connection, from, Payload::control(message));
    }

    pub(crate) fn close(&mut self, connection: usize, at: HostId) {
        let Self { network, clock, dice, .. } = self;
        network.close(connection, at, (clock, dice));
    }

    /// Returns what is open at a host of a migration.
    pub(crate) fn connections_of(&self, migration: MigrationId, at: HostId) -> Vec<usize> {
        let all = self.network.connections.iter().enumerate();
        all.filter(|(_, it)| it.open[at] && it.purpose.migration() == migration)
            .map(|(index, _)| index)
            .collect()
    }

    pub(crate) fn path_round_trip(&self) -> Duration {
        2 * self.network.paths[1..].iter().map(|path| path.latency).max().unwrap_or_default()
    }

    /// Returns what lanes of a VMM's memory work with.
    pub(crate) fn bench(&mut self, host: HostId, vmm: usize) -> Bench<'_> {
        let Self { clock, dice, network, vmms, plan, plant, hosts, .. } = self;
        Bench {
            clock,
            dice,
            network,
            memory: &vmms[vmm].memory,
            host,
            epoch: hosts[host].epoch,
            plant: *plant,
            silence: plan.silence,
            compressed_percent: plan.compressed_percent,
            socket_buffer: plan.socket_buffer,
        }
    }
}
