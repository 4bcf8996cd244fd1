//! The bodies of requests and answers, shared by the daemon, `memlanectl` and other clients in Rust. Field names carry
//! their units. A field that is `null` is not known (yet).

mod error;
mod guest;
mod host;
mod migration;
mod order;

pub use error::{ApiError, ErrorBody, ErrorCode};
pub use guest::{Attach, Launch};
pub use host::{GuestInfo, NicInfo, PeerInfo, PortInfo, Standing, Status};
pub use migration::{
    Forecast, Lane, LaneState, Migration, MigrationName, Outcome, Phase, Postcopy, Role, Round, Stun,
};
pub use order::{
    CheckReport, Compression, Converge, Estimate, Finding, Order, PortCheck, Resolution, Resolve, Severity,
    WhenPostcopy,
};
