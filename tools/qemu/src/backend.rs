//! A memory backend becomes a file that QEMU and the daemon share.

use std::fs;
use std::path::Path;

use crate::host::Host;
use crate::size;
use crate::warning::Warning;
use memlane_qmp::options::{Properties, Value};

/// This property says by which name the backend's RAM goes into a migration stream.
pub(crate) const CANONICAL: &str = "x-use-canonical-path-for-ramblock-id";

/// Makes a memory backend a shared file, and returns whether that changed it. Other objects stay as they are.
///
/// # Errors
///
/// Fails if there is no place for it; the object is as it was then.
pub(crate) fn share(object: &mut dyn Properties, host: &mut Host) -> Result<bool, Warning> {
    let kind = object.get("qom-type").unwrap_or_default();
    match kind.as_str() {
        "memory-backend-ram" | "memory-backend-memfd" | "memory-backend-shm" => {
            share_nameless(object, &kind, host)?
        }
        "memory-backend-file" if !object.is_on("share") => return share_private(object),
        _ => return Ok(false),
    }
    Ok(true)
}

/// Changes a backend without a file.
fn share_nameless(object: &mut dyn Properties, kind: &str, host: &mut Host) -> Result<(), Warning> {
    let what = name(object);
    let place = if kind == "memory-backend-memfd" && object.is_on("hugetlb") {
        let page = object.get("hugetlbsize").map(|text| {
            let unknown =
                || Warning::new(format!("{what} has hugetlbsize={text}, which is no size"), "correct it");
            size::parse(&text).ok_or_else(unknown)
        });
        host.huge(&what, page.transpose()?)?
    } else {
        let bytes = object.get("size").and_then(|text| size::parse(&text)).unwrap_or(0);
        host.ordinary(&what, bytes)?
    };
    let Some(place) = place.to_str().filter(|place| !place.contains('"')) else {
        return Err(Warning::new(
            format!("{what} cannot lie in {}, a name that QEMU does not understand", place.display()),
            "name another directory by MEMLANE_RAM",
        ));
    };
    object.set("qom-type", Value::Text("memory-backend-file"));
    object.set("share", Value::Switch(true));
    // A directory: QEMU makes a file in it that has no name, and so nothing is left behind.
    object.set("mem-path", Value::Text(place));
    for key in ["hugetlb", "hugetlbsize", "seal"] {
        object.remove(key);
    }
    // Machines before 4.0 name the RAM of files and memfds, and only theirs, by a path (hw_compat_3_1 in
    // hw/core/machine.c of QEMU).
    if kind != "memory-backend-memfd" && object.get(CANONICAL).is_none() {
        object.set(CANONICAL, Value::Switch(false));
    }
    Ok(())
}

/// Changes a backend that has a file, to which the guest's writes did not go until now.
fn share_private(object: &mut dyn Properties) -> Result<bool, Warning> {
    let what = name(object);
    let Some(path) = object.get("mem-path") else { return Ok(false) };
    if object.is_on("readonly") || holds_data(Path::new(&path)) {
        return Err(private_data(&what, &path));
    }
    if !is_memory(Path::new(&path)) {
        return Err(on_a_disk(&what, &path));
    }
    object.set("share", Value::Switch(true));
    Ok(true)
}

/// Returns the warning about a private file whose data a guest must not write to.
pub(crate) fn private_data(what: &str, path: &str) -> Warning {
    Warning::new(
        format!("{what} is a private copy of {path}, which has data that the guest would write to"),
        "name a directory or a new file in its place, or share it (share=on)",
    )
}

/// Returns the warning about a private file whose file system would be given all that the guest writes.
pub(crate) fn on_a_disk(what: &str, path: &str) -> Warning {
    Warning::new(
        format!("{what} lies at {path}, which is no memory: shared, all of it would be written there"),
        "name a tmpfs or a hugetlbfs in its place",
    )
}

/// Tells whether a file lies, or would lie, in a file system of memory.
pub(crate) fn is_memory(path: &Path) -> bool {
    /// The numbers of tmpfs and of hugetlbfs, as statfs(2) tells them.
    const MEMORY: [u64; 2] = [0x0102_1994, 0x9584_58f6];
    let at = if path.exists() { Some(path) } else { path.parent() };
    let system = at.and_then(|at| rustix::fs::statfs(at).ok());
    system.is_some_and(|system| MEMORY.contains(&(system.f_type as u64 & 0xffff_ffff)))
}

/// Tells whether there is a device, or a file that is not empty. In a directory QEMU makes a new file, without data.
pub(crate) fn holds_data(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| !found.is_dir() && (!found.is_file() || found.len() > 0))
}

fn name(object: &dyn Properties) -> String {
    format!("the memory backend {}", object.get("id").unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value as Json, json};

    use super::*;
    use crate::host::HugePages;
    use memlane_qmp::options::Options;

    fn host() -> Host {
        let hugetlbfs = vec![HugePages { path: "/dev/hugepages".into(), page_bytes: 2 << 20 }];
        Host { ram: "/dev/shm".into(), room: Ok(64 << 30), hugetlbfs, huge_page: Some(2 << 20) }
    }

    fn shared(text: &str) -> Result<String, String> {
        let mut options = Options::parse(text, "qom-type");
        share(&mut options, &mut host()).map_err(|warning| warning.to_string())?;
        Ok(options.to_string())
    }

    fn shared_json(object: Json) -> Json {
        let mut object: Map<String, Json> = serde_json::from_value(object).unwrap();
        share(&mut object, &mut host()).unwrap();
        Json::Object(object)
    }

    #[test]
    fn backends_without_a_file_get_one() {
        for (before, after) in [
            (
                "memory-backend-ram,id=ram0,size=2G",
                "memory-backend-file,id=ram0,size=2G,share=on,mem-path=/dev/shm,x-use-canonical-path-for-ramblock-id=off",
            ),
            (
                "memory-backend-ram,id=r,size=1G,host-nodes=0,host-nodes=2-3,policy=bind,prealloc=on,prealloc-threads=4,\
                 prealloc-context=t,merge=off,dump=off,reserve=off,share=off",
                "memory-backend-file,id=r,size=1G,host-nodes=0,host-nodes=2-3,policy=bind,prealloc=on,prealloc-threads=4,\
                 prealloc-context=t,merge=off,dump=off,reserve=off,share=on,mem-path=/dev/shm,\
                 x-use-canonical-path-for-ramblock-id=off",
            ),
            (
                "qom-type=memory-backend-memfd,id=a,,b,share=on,seal=off,size=1.5G",
                "qom-type=memory-backend-file,id=a,,b,share=on,size=1.5G,mem-path=/dev/shm",
            ),
            (
                "memory-backend-shm,id=r,size=1G,x-use-canonical-path-for-ramblock-id=on",
                "memory-backend-file,id=r,size=1G,x-use-canonical-path-for-ramblock-id=on,share=on,mem-path=/dev/shm",
            ),
            (
                "memory-backend-memfd,id=h,size=1G,hugetlb=on,hugetlbsize=2M",
                "memory-backend-file,id=h,size=1G,share=on,mem-path=/dev/hugepages",
            ),
            (
                "memory-backend-memfd,id=h,size=1G,hugetlb",
                "memory-backend-file,id=h,size=1G,share=on,mem-path=/dev/hugepages",
            ),
        ] {
            assert_eq!(shared(before).as_deref(), Ok(after));
        }
    }

    #[test]
    fn json_is_changed_alike() {
        let before = json!({ "qom-type": "memory-backend-ram", "id": "pc.ram", "size": 2147483648u64 });
        let after = json!({
            "qom-type": "memory-backend-file", "id": "pc.ram", "size": 2147483648u64, "share": true,
            "mem-path": "/dev/shm", "x-use-canonical-path-for-ramblock-id": false,
        });
        assert_eq!(shared_json(before), after);
        let before = json!({
            "qom-type": "memory-backend-memfd", "id": "ram-node0", "hugetlb": true, "hugetlbsize": 2097152, "seal": true,
            "size": 1073741824, "host-nodes": [0, 2], "policy": "bind", "prealloc": true,
        });
        let after = json!({
            "qom-type": "memory-backend-file", "id": "ram-node0", "share": true, "mem-path": "/dev/hugepages",
            "size": 1073741824, "host-nodes": [0, 2], "policy": "bind", "prealloc": true,
        });
        assert_eq!(shared_json(before), after);
    }

    #[test]
    fn other_objects_stay_as_they_are() {
        for text in [
            "memory-backend-file,share=on,id=a,mem-path=/a,,b,size=1G",
            "memory-backend-file,id=a,mem-path=/x,size=1G,share",
            "memory-backend-epc,id=a,size=1G",
            "iothread,id=io0",
            "",
        ] {
            assert_eq!(shared(text).as_deref(), Ok(text));
        }
    }

    #[test]
    fn a_private_file_is_shared_if_no_data_is_lost_by_it() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = directory.path().join("ram");
        let path = file.to_str().unwrap();
        let new = format!("memory-backend-file,id=a,mem-path={path},align=2M,pmem=off,share=off,size=1G");
        assert_eq!(shared(&new), Ok(new.replace("share=off", "share=on")));
        let in_directory =
            format!("memory-backend-file,id=a,mem-path={},size=1G", directory.path().display());
        assert_eq!(shared(&in_directory), Ok(format!("{in_directory},share=on")));
        fs::write(&file, "data").unwrap();
        let told = shared(&new).unwrap_err();
        assert!(
            told.contains("the memory backend a is a private copy") && told.contains("cannot be moved"),
            "{told}"
        );
        assert!(shared("memory-backend-file,id=a,mem-path=/nonexistent,readonly=on").is_err());
        let told = shared("memory-backend-file,id=a,mem-path=/proc/ram,size=1G").unwrap_err();
        assert!(told.contains("which is no memory") && told.contains("tmpfs"), "{told}");
    }

    #[test]
    fn what_has_no_place_is_left_alone() {
        for text in [
            "memory-backend-memfd,id=h,size=1G,hugetlb=on,hugetlbsize=1G",
            "memory-backend-memfd,id=h,size=1G,hugetlb=on,hugetlbsize=x",
            "memory-backend-ram,id=h,size=65G",
        ] {
            let mut options = Options::parse(text, "qom-type");
            share(&mut options, &mut host()).unwrap_err();
            assert_eq!(options.to_string(), text);
        }
    }
}
