//! The OpenAPI description of the API. It is generated from the types and routes, and committed as `openapi.json`, and a
//! test compares the two.

use utoipa::OpenApi;

use super::routes;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "memlaned",
        description = "Moves running guests to other hosts. Served on the Unix socket \
                       /run/memlane/api.sock. A field that is null is not known (yet). Who connects decides what may \
                       be done: operators may give orders, viewers may only look (GET), and all others are answered \
                       with 403, whatever they ask.",
    ),
    paths(
        routes::status,
        routes::ports,
        routes::peers,
        routes::guests,
        routes::launch,
        routes::attach,
        routes::detach,
        routes::check,
        routes::migrations,
        routes::migrate,
        routes::migration,
        routes::cancel,
        routes::abandon,
        routes::resolve,
        routes::events,
        routes::openapi,
        routes::metrics,
    ),
    tags(
        (name = "host", description = "What this host has"),
        (name = "guests", description = "QEMU guests"),
        (name = "migrations", description = "Moving guests"),
    )
)]
struct Description;

/// Generates the description from the code.
pub fn generated() -> String {
    let mut text = Description::openapi().to_pretty_json().expect("it has string keys only, and cannot fail");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use hyper::Method;

    use super::*;

    /// `MEMLANE_WRITE_OPENAPI=1 cargo test -p memlaned openapi` writes the file anew.
    #[test]
    fn the_committed_description_is_true() {
        let generated = generated();
        if std::env::var_os("MEMLANE_WRITE_OPENAPI").is_some() {
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api/openapi.json");
            std::fs::write(file, &generated).unwrap();
            return;
        }
        assert!(
            generated == routes::DESCRIPTION,
            "daemon/src/api/openapi.json is out of date; write it anew with \
             MEMLANE_WRITE_OPENAPI=1 cargo test -p memlaned openapi"
        );
    }

    #[test]
    fn it_describes_what_is_routed_and_nothing_else() {
        let description: serde_json::Value = serde_json::from_str(&generated()).unwrap();
        let mut described = BTreeSet::new();
        for (path, methods) in description["paths"].as_object().unwrap() {
            for method in methods.as_object().unwrap().keys() {
                let method: Method = method.to_uppercase().parse().unwrap();
                let example = path.replace("{id}", "0123abcd").replace("{name}", "web1");
                routes::find(&method, &example).unwrap_or_else(|error| panic!("{method} {path}: {error:?}"));
                described.insert((method.to_string(), path.clone()));
            }
        }
        let routed =
            routes::ROUTES.iter().map(|(method, path, _)| (method.to_string(), (*path).to_owned())).collect();
        assert_eq!(described, routed);
    }
}
