//! The daemon's API: HTTP/1.1 and JSON on a Unix socket, described by `openapi.json`.
//!
//! [`types`](memlane_api::types) are the bodies, and [`body`] reads those of requests. [`routes`] maps paths to calls,
//! [`Backend`] answers the calls, [`server`] serves connections, and [`access`] decides who may do what.

pub mod access;
pub mod body;
mod call;
mod caller;
mod connections;
mod gate;
mod line;
pub mod openapi;
pub mod routes;
pub mod server;
mod shares;
mod streams;

#[cfg(test)]
mod tests;

use async_trait::async_trait;
use memlane_api::types::{
    ApiError, Attach, CheckReport, GuestInfo, Launch, Migration, Order, PeerInfo, PortInfo, Resolve, Status,
};
use tokio::sync::watch;

pub use access::Role;
pub use caller::Caller;

/// The backend answers the calls of the API; the daemon's is the host.
///
/// Methods that are not `async` answer at once. The others bound their own time, and are run to their end even if the
/// client goes away. Methods that change something get the caller, for the log.
#[async_trait(?Send)]
pub trait Backend {
    /// Returns the state of the daemon and its host.
    async fn status(&self) -> Status;
    /// Lists the ports lent to migrations.
    async fn ports(&self) -> Vec<PortInfo>;
    /// Lists the hosts that guests may move to and come from.
    fn peers(&self) -> Vec<PeerInfo>;
    /// Lists the attached guests.
    fn guests(&self) -> Vec<GuestInfo>;
    /// Starts a QEMU guest.
    async fn launch(&self, caller: Caller, launch: Launch) -> Result<GuestInfo, ApiError>;
    /// Attaches a QEMU guest that another program started.
    async fn attach(&self, caller: Caller, attach: Attach) -> Result<GuestInfo, ApiError>;
    /// Detaches a QEMU guest, which runs on without the daemon. Returns the guest as it was.
    async fn detach(&self, caller: Caller, name: &str) -> Result<GuestInfo, ApiError>;
    /// Lists the migrations under way and those that ended lately, the oldest first.
    fn migrations(&self) -> Vec<Migration>;
    /// Returns one migration.
    fn migration(&self, id: &str) -> Result<Migration, ApiError>;
    /// Makes a dry run of an order: all of its preflight, and nothing else.
    async fn check(&self, order: Order) -> Result<CheckReport, ApiError>;
    /// Does the preflight of an order and begins the migration, which then runs on its own.
    async fn migrate(&self, caller: Caller, order: Order) -> Result<Migration, ApiError>;
    /// Asks to cancel a migration. It has ended when it has an outcome.
    fn cancel(&self, caller: Caller, id: &str) -> Result<Migration, ApiError>;
    /// Gives up the missing memory of a guest that runs at its destination in post-copy.
    fn abandon(&self, caller: Caller, id: &str) -> Result<Migration, ApiError>;
    /// Carries out an operator's decision about a guest in doubt.
    fn resolve(&self, caller: Caller, id: &str, resolve: Resolve) -> Result<Migration, ApiError>;
    /// Follows a migration. The sender sets the outcome last and may then be dropped.
    fn watch(&self, id: &str) -> Result<watch::Receiver<Migration>, ApiError>;
    /// Returns all metrics in the text format of Prometheus.
    async fn metrics(&self) -> String;
}
