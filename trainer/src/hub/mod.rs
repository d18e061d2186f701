//! The Hugging Face hub: files of a repository, fetched once and kept where huggingface_hub keeps them.
//!
//! Files land where huggingface_hub looks for them: `HF_HOME/hub/models--ORG--NAME/snapshots/COMMIT/FILE`, and `refs/main`
//! names the commit. They lie there as plain files, as huggingface_hub lays them where it has no symbolic links.
//!
//! Of the environment, `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` and `HF_HUB_OFFLINE` are
//! honoured.

#[cfg(test)]
pub(crate) mod testing;
mod transfer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;

use crate::system::heartbeat;
use crate::{Error, Result};

/// Where files come from and where they are kept.
pub(crate) struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    agent: ureq::Agent,
    /// Between two attempts.
    pause: Duration,
}

/// A repository on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Repository {
    kind: Kind,
    /// `ORG/NAME`, or of the oldest models `NAME`.
    pub(crate) id: String,
    /// A branch, a tag or a commit.
    revision: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    DataSet,
}

/// A commit of a repository, and where its files lie.
pub(crate) struct Snapshot {
    pub(crate) path: PathBuf,
    commit: String,
    /// Every file that it has on the hub.
    pub(crate) names: Vec<String>,
}

/// What the hub says of a repository.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Repository {
    /// The model `id`.
    pub(crate) fn model(id: &str) -> Self {
        Self { kind: Kind::Model, id: id.to_owned(), revision: "main".to_owned() }
    }

    /// `models--ORG--NAME` in the cache.
    fn folder(&self) -> String {
        let kind = if self.kind == Kind::Model { "models" } else { "datasets" };
        format!("{kind}--{}", self.id.replace('/', "--"))
    }

    /// Where the hub lists it.
    fn listing(&self) -> String {
        let kind = if self.kind == Kind::Model { "models" } else { "datasets" };
        format!("/api/{kind}/{}/revision/{}", self.id, encoded(&self.revision))
    }

    /// Where the hub has its files.
    fn files(&self) -> String {
        let kind = if self.kind == Kind::Model { "" } else { "/datasets" };
        format!("{kind}/{}/resolve", self.id)
    }
}

/// `ORG/NAME` of letters, digits, `-`, `_` and `.`.
pub(crate) fn is_id(text: &str) -> bool {
    text.split_once('/').is_some_and(|(org, name)| is_name(org) && is_name(name))
}

/// A part of an id. `--` stands between them in the cache.
pub(crate) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && !text.contains("--")
        && !text.contains("..")
}

/// A path or a revision as a URL has it.
fn encoded(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    path.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// What begins the path of a file in a data set on the hub.
const DATA_SETS: &str = "hf://datasets/";

/// Whether a path names a file of a data set on the hub.
pub(crate) fn is_data_set(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.starts_with(DATA_SETS))
}

/// The file that a path names: on this machine the path itself, and of `hf://datasets/ORG/NAME/FILE` (or
/// `…/NAME@REVISION/FILE`) the file in the cache, fetched if need be.
///
/// # Errors
/// The path does not name a data set's file; there is none, or no right to it; no network and not in the cache.
pub fn data_file(path: &Path) -> Result<PathBuf> {
    match path.to_str().and_then(|path| path.strip_prefix(DATA_SETS)) {
        Some(rest) => Hub::new()?.data_file(rest),
        None => Ok(path.to_owned()),
    }
}

impl Hub {
    /// The one that the environment describes.
    pub(crate) fn new() -> Result<Self> {
        Self::from_env(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    pub(crate) fn from_env(env: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let home = match env("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => match env("XDG_CACHE_HOME") {
                Some(cache) => PathBuf::from(cache).join("huggingface"),
                None => match env("HOME") {
                    Some(home) => PathBuf::from(home).join(".cache/huggingface"),
                    None => {
                        return Err(Error::Usage(
                            "neither HF_HOME nor HOME is set: no place for models".into(),
                        ));
                    }
                },
            },
        };
        let token = env("HF_TOKEN").or_else(|| {
            let path = env("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
            std::fs::read_to_string(path).ok()
        });
        let endpoint = env("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let offline = env("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()));
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: env("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline,
            agent: agent(Duration::from_secs(60)),
            pause: Duration::from_secs(1),
        })
    }

    fn data_file(&self, rest: &str) -> Result<PathBuf> {
        let mut parts = rest.splitn(3, '/');
        let (org, name, file) = (parts.next(), parts.next(), parts.next());
        let (Some(org), Some(name), Some(file)) = (org, name, file.filter(|file| !file.is_empty())) else {
            let message = "expected hf://datasets/ORG/NAME/FILE";
            return Err(Error::file(format!("{DATA_SETS}{rest}"), message));
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let id = format!("{org}/{name}");
        // Names go into paths of the cache.
        let safe =
            |text: &str| !text.is_empty() && text.split('/').all(|part| !part.is_empty() && part != "..");
        if !is_id(&id) || !safe(revision) || !safe(file) {
            let message = "expected hf://datasets/ORG/NAME/FILE, or …/NAME@REVISION/FILE";
            return Err(Error::file(format!("{DATA_SETS}{rest}"), message));
        }
        let repository = Repository { kind: Kind::DataSet, id, revision: revision.to_owned() };
        let cached = |path: &Path| path.join(file).is_file();
        let snapshot = match self.snapshot(&repository, cached)? {
            Found::Cached(path) => return Ok(path.join(file)),
            Found::Listed(snapshot) => snapshot,
        };
        if !snapshot.names.iter().any(|name| name == file) {
            let like: Vec<_> = snapshot.names.iter().take(5).map(String::as_str).collect();
            let message = format!("the data set has no such file; it has {}", like.join(", "));
            return Err(Error::file(format!("{DATA_SETS}{rest}"), message));
        }
        self.fetch(&repository, &snapshot, &[file])?;
        self.note(&repository, &snapshot)?;
        Ok(snapshot.path.join(file))
    }

    /// The commit that a repository stands at. Offline, or without a network, what the cache has of it, if that is `whole`.
    ///
    /// # Errors
    /// No such repository, or no right to it; neither a network nor a whole copy in the cache.
    pub(crate) fn snapshot(&self, repository: &Repository, whole: impl Fn(&Path) -> bool) -> Result<Found> {
        self.first(std::slice::from_ref(repository), whole).map(|(_, found)| found)
    }

    /// The first of these repositories that there is, and the commit that it stands at, as [`Self::snapshot`] says it.
    ///
    /// # Errors
    /// As there; the error names the first.
    pub(crate) fn first<'a>(
        &self,
        repositories: &'a [Repository],
        whole: impl Fn(&Path) -> bool,
    ) -> Result<(&'a Repository, Found)> {
        let [named, others @ ..] = repositories else {
            return Err(Error::Usage("no repository is named".to_owned()));
        };
        let id = &named.id;
        let cached = || {
            repositories.iter().find_map(|repository| {
                let home = self.home(repository);
                let commit = std::fs::read_to_string(home.join("refs").join(&repository.revision)).ok()?;
                let path = home.join("snapshots").join(commit.trim());
                whole(&path).then_some((repository, path))
            })
        };
        if self.offline {
            let found = cached().map(|(repository, path)| (repository, Found::Cached(path)));
            return found.ok_or_else(|| {
                let message = format!(
                    "not a folder, and not whole in the cache {}, and HF_HUB_OFFLINE is set\nhint: give a folder, or fetch \
                     it once without HF_HUB_OFFLINE",
                    self.home(named).display()
                );
                Error::file(id, message)
            });
        }
        let url = |repository: &Repository| format!("{}{}", self.endpoint, repository.listing());
        let (mut repository, mut answer) = (named, self.get(&url(named), None));
        for other in others {
            // To somebody without a name the hub answers 401 for what does not exist.
            if !matches!(answer, Err(ureq::Error::StatusCode(401 | 404))) {
                break;
            }
            (repository, answer) = (other, self.get(&url(other), None));
        }
        let url = url(repository);
        let info: Info = match answer {
            Ok(mut response) => serde_json::from_reader(response.body_mut().as_reader())
                .map_err(|error| Error::file(id, format!("{url}: unexpected answer: {error}")))?,
            Err(error) => {
                return match cached() {
                    Some((repository, path)) if !matches!(error, ureq::Error::StatusCode(_)) => {
                        tracing::warn!("{}: {error}; going on with {}", self.endpoint, path.display());
                        Ok((repository, Found::Cached(path)))
                    }
                    _ => Err(self.refusal(id, &url, &error)),
                };
            }
        };
        if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(Error::file(id, format!("{url}: unexpected answer: commit {:?}", info.sha)));
        }
        let listed = Snapshot {
            path: self.home(repository).join("snapshots").join(&info.sha),
            names: info.siblings.into_iter().map(|sibling| sibling.rfilename).collect(),
            commit: info.sha,
        };
        Ok((repository, Found::Listed(listed)))
    }

    /// Fetches those of `names` that the snapshot lacks. Ranks of one node ask for the same files at once: the first fetches,
    /// the others find them.
    pub(crate) fn fetch(
        &self,
        repository: &Repository,
        snapshot: &Snapshot,
        names: &[impl AsRef<str>],
    ) -> Result<()> {
        if names.iter().all(|name| snapshot.path.join(name.as_ref()).exists()) {
            return Ok(());
        }
        create_dir_all(&snapshot.path)?;
        let lock = self.home(repository).join(".lock");
        let _lock = File::create(&lock)
            .and_then(|file| heartbeat::while_waiting(|| file.lock()).map(|()| file))
            .map_err(Error::write("lock", lock))?;
        names.iter().try_for_each(|name| self.file(repository, snapshot, name.as_ref()))
    }

    /// Notes that the revision is this commit: what is offline later is this snapshot.
    pub(crate) fn note(&self, repository: &Repository, snapshot: &Snapshot) -> Result<()> {
        let place = self.home(repository).join("refs").join(&repository.revision);
        if let Some(parent) = place.parent() {
            create_dir_all(parent)?;
        }
        std::fs::write(&place, &snapshot.commit).map_err(Error::write("write", place))
    }

    fn home(&self, repository: &Repository) -> PathBuf {
        self.cache.join(repository.folder())
    }
}

/// What is known of a repository.
pub(crate) enum Found {
    /// Only what an earlier time has left, which is whole.
    Cached(PathBuf),
    /// What the hub says now.
    Listed(Snapshot),
}

/// A server that sends nothing for `stall` is given up.
fn agent(stall: Duration) -> ureq::Agent {
    ureq::Agent::config_builder()
        .user_agent(concat!("lodestone/", env!("CARGO_PKG_VERSION")))
        // The hub redirects within itself before it hands over to its storage, which must not see the token.
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(stall))
        .timeout_per_read(Some(stall))
        .build()
        .into()
}

fn create_dir_all(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(Error::write("create", path))
}

#[cfg(test)]
mod tests {
    use super::testing::{Answer, Server, body, hub, listing};
    use super::*;

    const FILE: &str = "/datasets/org/set/resolve/abc123/data/train.jsonl";

    fn routes() -> Vec<(&'static str, Answer)> {
        vec![
            ("/api/datasets/org/set/revision/main", listing(&["README.md", "data/train.jsonl"])),
            ("/api/datasets/org/set/revision/v2", listing(&["data/train.jsonl"])),
            (FILE, Answer::Redirect("/cdn/train".into())),
            ("/cdn/train", body("{}\n")),
        ]
    }

    #[test]
    fn files_of_data_sets_land_in_the_cache_and_serve_offline() {
        let server = Server::start(&routes());
        let home = tempfile::tempdir().unwrap();
        let online = hub(&server.endpoint, home.path(), &[]);
        let file = online.data_file("org/set/data/train.jsonl").unwrap();
        assert_eq!(file, home.path().join("hub/datasets--org--set/snapshots/abc123/data/train.jsonl"));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "{}\n");
        assert_eq!(online.data_file("org/set@v2/data/train.jsonl").unwrap(), file);
        assert_eq!(server.paths().iter().filter(|path| *path == FILE).count(), 1);
        for env in [("HF_HUB_OFFLINE", "1"), ("HF_TOKEN", "unused")] {
            let alone = hub("http://127.0.0.1:1", home.path(), &[env]);
            assert_eq!(alone.data_file("org/set/data/train.jsonl").unwrap(), file);
        }
        let error = online.data_file("org/set/data/test.jsonl").unwrap_err().to_string();
        assert!(
            error.contains("the data set has no such file; it has README.md, data/train.jsonl"),
            "{error}"
        );
    }

    #[test]
    fn a_download_that_stalls_goes_on_where_it_stopped() {
        let text = "{}\n".repeat(1000);
        let mut routes = routes();
        routes.push(("/cdn/train", Answer::StallOnce(1500, text.clone().into())));
        let server = Server::start(&routes);
        let home = tempfile::tempdir().unwrap();
        let hub = hub(&server.endpoint, home.path(), &[]);
        let hub = Hub { agent: agent(Duration::from_secs(1)), ..hub };
        let file = hub.data_file("org/set/data/train.jsonl").unwrap();
        assert_eq!(std::fs::read_to_string(file).unwrap(), text);
        assert_eq!(server.seen.lock().unwrap().last().unwrap().1, "bytes=1500-");
    }

    #[test]
    fn names_of_files_are_encoded_in_urls() {
        let name = "data/a#1 b.jsonl";
        let server = Server::start(&[
            ("/api/datasets/org/set/revision/v%231", listing(&[name])),
            ("/datasets/org/set/resolve/abc123/data/a%231%20b.jsonl", body("{}\n")),
        ]);
        let home = tempfile::tempdir().unwrap();
        let file = hub(&server.endpoint, home.path(), &[]).data_file("org/set@v#1/data/a#1 b.jsonl").unwrap();
        assert!(file.ends_with(name), "{}", file.display());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "{}\n");
        assert_eq!(encoded("a/é?%-._~"), "a/%C3%A9%3F%25-._~");
    }

    #[test]
    fn paths_that_name_no_file_are_refused() {
        let home = tempfile::tempdir().unwrap();
        let hub = hub("http://127.0.0.1:1", home.path(), &[]);
        for rest in
            ["", "org", "org/set", "org/set/", "org/set/../x", "../set/x", "org/set@/x", "org/set@../x"]
        {
            let error = hub.data_file(rest).unwrap_err().to_string();
            assert!(error.contains("expected hf://datasets/ORG/NAME/FILE"), "{rest}: {error}");
        }
        assert_eq!(data_file(Path::new("rows.jsonl")).unwrap(), Path::new("rows.jsonl"));
    }
}
