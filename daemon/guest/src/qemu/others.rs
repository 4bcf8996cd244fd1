//! Others may have QEMU work while its guest is to be moved: a job of theirs is neither to be spoiled nor to spoil the move.

use serde_json::{Value, json};

use super::qmp::{Qmp, is_migrating, items};
use crate::{Blocker, DriverError};

/// Finds what QEMU does for others that does not go together with a move.
///
/// # Errors
///
/// Fails if QEMU does not answer.
pub(super) async fn at_work(qmp: &Qmp) -> Result<Vec<Blocker>, DriverError> {
    let mut found = Vec::new();
    let jobs = qmp.execute("query-jobs", json!({})).await?;
    found.extend(items(&jobs).iter().filter_map(job));
    found.extend(migration(&qmp.migration().await?));
    found.extend(dump(&qmp.execute("query-dump", json!({})).await?));
    Ok(found)
}

fn job(job: &Value) -> Option<Blocker> {
    let text = |key: &str| job[key].as_str().unwrap_or_default();
    // What is over and was not dismissed yet does nothing any more.
    if matches!(text("status"), "concluded" | "null") {
        return None;
    }
    let (id, kind, status) = (text("id"), text("type"), text("status"));
    let detail =
        format!("job {id} of QEMU ({kind}, {status}) works on the guest's disks, and would not go with it");
    let remedy = format!("wait until it has ended, or end it (QEMU's job-cancel or job-complete of {id})");
    Some(Blocker::new("job", detail, Some(remedy)))
}

fn migration(state: &str) -> Option<Blocker> {
    let detail = || format!("another program has QEMU migrate or save the guest (its state is {state})");
    let remedy = || "wait until that has ended, or cancel it where it was begun".to_owned();
    is_migrating(state).then(|| Blocker::new("job", detail(), Some(remedy())))
}

fn dump(answer: &Value) -> Option<Blocker> {
    let detail = "another program has QEMU dump the guest's memory, which stops the guest".to_owned();
    (answer["status"] == "active")
        .then(|| Blocker::new("job", detail, Some("wait until that has ended".into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_do_is_named() {
        let mirror = job(&json!({ "id": "m0", "type": "mirror", "status": "ready" })).unwrap();
        assert!(
            mirror.detail.contains("m0 of QEMU (mirror, ready)") && mirror.remedy.unwrap().contains("m0")
        );
        assert!(job(&json!({ "id": "m0", "type": "mirror", "status": "concluded" })).is_none());
        assert!(migration("active").unwrap().detail.contains("active"));
        assert!(migration("").is_none() && migration("completed").is_none());
        assert!(
            dump(&json!({ "status": "active" })).is_some() && dump(&json!({ "status": "none" })).is_none()
        );
    }
}
