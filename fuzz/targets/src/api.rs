//! The bodies of requests to the API, and of its answers.

use std::fmt::Debug;

use memlane_api::json::to_json;
use memlane_api::types::{
    Attach, CheckReport, ErrorBody, ErrorCode, GuestInfo, Launch, Migration, Order, PeerInfo, PortInfo,
    Resolve, Status,
};
use memlane_protocol::wire::is_obeyed;
use memlaned::api::body::{Content, parse};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::guest_file;

/// Reads a body as the daemon reads requests, and as `memlanectl` reads answers.
pub fn api(body: &[u8]) {
    request::<Order>(body);
    request::<Resolve>(body);
    request::<Attach>(body);
    if let Some(launch) = request::<Launch>(body) {
        guest_file(launch.definition.as_bytes());
    }
    answer::<Status>(body);
    answer::<Migration>(body);
    answer::<CheckReport>(body);
    answer::<Vec<PortInfo>>(body);
    answer::<Vec<PeerInfo>>(body);
    answer::<Vec<GuestInfo>>(body);
    answer::<ErrorBody>(body);
}

fn request<T: Content + Serialize + PartialEq + Debug>(body: &[u8]) -> Option<T> {
    match parse::<T>(body) {
        Ok(content) => {
            assert_eq!(parse::<T>(to_json(&content).as_bytes()).as_ref(), Ok(&content));
            Some(content)
        }
        Err(error) => {
            assert_eq!(error.code, ErrorCode::Invalid, "the client's fault, not the daemon's");
            shown(&ErrorBody { error });
            None
        }
    }
}

fn answer<T: Serialize + DeserializeOwned + PartialEq + Debug>(body: &[u8]) {
    if let Ok(content) = serde_json::from_slice::<T>(body) {
        shown(&content);
    }
}

/// Checks that a terminal shows the JSON of an answer, and that it is read again as it was.
fn shown<T: Serialize + DeserializeOwned + PartialEq + Debug>(content: &T) {
    let json = to_json(content);
    assert!(!json.contains(is_obeyed), "a terminal would obey {json:?}");
    assert_eq!(serde_json::from_str::<T>(&json).ok().as_ref(), Some(content));
}
