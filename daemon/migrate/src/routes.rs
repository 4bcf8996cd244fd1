//! A route leads from a port of this host to one of the destination, and lanes are opened on it.

use std::cell::Cell;
use std::rc::Rc;

use memlane_net::config::PortConfig;
use memlane_net::port::{self, OpenError};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::Port;
use memlane_protocol::wire::hello::{Purpose, Token};

use crate::context::Context;
use crate::lanes::LaneEnd;

/// There may be this many streams over one pair of ports.
const MOST_LANES: u16 = memlane_net::config::MAX_LANES as u16;

/// The routes of one migration, with those that cannot be used at present.
pub(crate) struct Routes {
    context: Rc<Context>,
    /// The routes lead to this host.
    peer: Label,
    token: Token,
    routes: Vec<Route>,
    /// This is the number of the next lane: no two of a migration have the same.
    next: Cell<u16>,
}

/// A port of this host, and the port of the same name there.
#[derive(Clone)]
pub(crate) struct Route {
    /// This is the port of this host.
    pub port: PortConfig,
    /// This is the port of the destination.
    pub there: Port,
}

impl Route {
    /// Returns how many lanes are opened on the route to begin with.
    pub(crate) fn lanes(&self) -> u16 {
        self.port.lanes.min(self.there.lanes).clamp(1, MOST_LANES)
    }
}

impl Routes {
    /// Makes routes to the ports that `peer`, the destination, offers, for lanes that say `token`.
    pub(crate) fn new(context: Rc<Context>, peer: Label, token: Token, theirs: &[Port]) -> Self {
        let route = |ours: &PortConfig| {
            let there = theirs.iter().find(|port| port.name == ours.name)?.clone();
            Some(Route { port: ours.clone(), there })
        };
        let routes = context.settings.ports.iter().filter_map(route).collect();
        Self { context, peer, token, routes, next: Cell::new(0) }
    }

    /// Returns the routes, one for each pair of ports.
    pub(crate) fn all(&self) -> &[Route] {
        &self.routes
    }

    /// Opens a lane on a route. The opening goes on by itself, and the returned future is done when it has ended.
    /// Returns `None` if this migration has had all the lanes that can be told apart.
    pub(crate) fn open(
        &self,
        route: &Route,
    ) -> Option<impl Future<Output = Result<LaneEnd, OpenError>> + use<>> {
        let number = self.next.get();
        self.next.set(number.checked_add(1)?);
        let purpose = Purpose::Lane { token: self.token, lane: number };
        Some(self.connect(route, purpose, number))
    }

    /// Opens a lane for pages that an access waits for.
    ///
    /// # Errors
    ///
    /// Fails if the destination cannot be reached, or refuses the lane.
    pub(crate) async fn open_faults(&self, route: &Route) -> Result<LaneEnd, OpenError> {
        let number = self.next.replace(self.next.get() + 1);
        self.connect(route, Purpose::Faults { token: self.token }, number).await
    }

    /// Opens a lane for the state of the VMM.
    ///
    /// # Errors
    ///
    /// Fails if the destination cannot be reached, or refuses the lane.
    pub(crate) async fn open_state(&self, route: &Route) -> Result<LaneEnd, OpenError> {
        let number = self.next.replace(self.next.get() + 1);
        self.connect(route, Purpose::State { token: self.token, lane: number }, number).await
    }

    fn connect(
        &self,
        route: &Route,
        purpose: Purpose,
        number: u16,
    ) -> impl Future<Output = Result<LaneEnd, OpenError>> + use<> {
        let (ours, remote) = (route.port.clone(), route.there.address);
        let caller = self.context.caller(&self.peer);
        let opening = tokio::task::spawn_blocking(move || {
            let opened = port::open(&ours, remote, &caller, purpose)?;
            let (local, socket, records) = (opened.local.to_string(), opened.socket, opened.records);
            Ok(LaneEnd { port: ours.name, number, local, remote, socket, records })
        });
        async move { opening.await.expect("opening a lane does not panic") }
    }
}
