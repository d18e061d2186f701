//! Client of the Hugging Face hub, with the cache of huggingface_hub.
//!
//! A file is stored at `HF_HOME/hub/models--ORG--NAME/snapshots/COMMIT/FILE`, and `refs/main` names the
//! commit. Snapshots hold the files themselves, as those of huggingface_hub on a file system without symbolic
//! links.
//!
//! These environment variables are read: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`,
//! `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`.

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

/// Client of one endpoint, with its cache.
pub(crate) struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    agent: ureq::Agent,
    /// Pause before the second attempt at a file; it grows with each attempt.
    pause: Duration,
}

/// Repository on the hub, at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Repository {
    repo_type: RepoType,
    /// `ORG/NAME`, or `NAME` for the oldest models.
    pub(crate) id: String,
    /// Branch, tag or commit.
    revision: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RepoType {
    Model,
    Dataset,
}

/// One commit of a repository, and its folder in the cache.
pub(crate) struct Snapshot {
    /// Folder in the cache, which may lack some of the files.
    pub(crate) path: PathBuf,
    commit: String,
    /// Names of all its files on the hub.
    pub(crate) names: Vec<String>,
}

/// Answer of the hub to a request for a repository's information.
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
    /// Main branch of the model `id`.
    pub(crate) fn model(id: &str) -> Self {
        Self { repo_type: RepoType::Model, id: id.to_owned(), revision: "main".to_owned() }
    }

    /// Name of the folder in the cache, `models--ORG--NAME`.
    fn folder(&self) -> String {
        let kind = if self.repo_type == RepoType::Model { "models" } else { "datasets" };
        format!("{kind}--{}", self.id.replace('/', "--"))
    }

    /// Path of the URL that lists the files.
    fn info_path(&self) -> String {
        let kind = if self.repo_type == RepoType::Model { "models" } else { "datasets" };
        format!("/api/{kind}/{}/revision/{}", self.id, percent_encode(&self.revision))
    }

    /// Path of the URL below which the files are.
    fn files_path(&self) -> String {
        let kind = if self.repo_type == RepoType::Model { "" } else { "/datasets" };
        format!("{kind}/{}/resolve", self.id)
    }
}

/// Whether `text` has the form `ORG/NAME`.
pub(crate) fn is_id(text: &str) -> bool {
    text.split_once('/').is_some_and(|(org, name)| is_name(org) && is_name(name))
}

/// Whether `text` can be a part of an id: letters, digits, `-`, `_`, `.`, but no `--`, which separates the
/// parts in the cache.
pub(crate) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && !text.contains("--")
        && !text.contains("..")
}

/// Percent-encodes a path or a revision for a URL.
fn percent_encode(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    path.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// Prefix of the path of a dataset's file on the hub.
const DATASETS: &str = "hf://datasets/";

/// Whether `path` names a file of a dataset on the hub.
pub(crate) fn is_data_set(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.starts_with(DATASETS))
}

/// Returns the local file that `path` names: `path` itself, or for `hf://datasets/ORG/NAME/FILE` and
/// `hf://datasets/ORG/NAME@REVISION/FILE` the file in the cache, which is fetched if needed.
///
/// # Errors
/// The path is malformed; there is no such file, or the hub denies access; there is no network and the file
/// is not cached.
pub fn data_file(path: &Path) -> Result<PathBuf> {
    match path.to_str().and_then(|path| path.strip_prefix(DATASETS)) {
        Some(rest) => Hub::new()?.data_file(rest),
        None => Ok(path.to_owned()),
    }
}

impl Hub {
    /// Makes the client that the environment variables describe.
    pub(crate) fn new() -> Result<Self> {
        Self::from_env(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// As [`Self::new`], with a function that returns the value of an environment variable.
    pub(crate) fn from_env(env: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let home = match env("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => match env("XDG_CACHE_HOME") {
                Some(cache) => PathBuf::from(cache).join("huggingface"),
                None => match env("HOME") {
                    Some(home) => PathBuf::from(home).join(".cache/huggingface"),
                    None => {
                        return Err(Error::Usage(
                            "neither HF_HOME nor HOME is set: models are cached in HF_HOME, by \
                             default ~/.cache/huggingface"
                                .into(),
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
            return Err(Error::file(format!("{DATASETS}{rest}"), message));
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let id = format!("{org}/{name}");
        // The parts become paths in the cache.
        let safe =
            |text: &str| !text.is_empty() && text.split('/').all(|part| !part.is_empty() && part != "..");
        if !is_id(&id) || !safe(revision) || !safe(file) {
            let message = "expected hf://datasets/ORG/NAME/FILE, or …/NAME@REVISION/FILE";
            return Err(Error::file(format!("{DATASETS}{rest}"), message));
        }
        let repository = Repository { repo_type: RepoType::Dataset, id, revision: revision.to_owned() };
        let cached = |path: &Path| path.join(file).is_file();
        let snapshot = match self.snapshot(&repository, cached)? {
            Lookup::Cached(path) => return Ok(path.join(file)),
            Lookup::Listed(snapshot) => snapshot,
        };
        if !snapshot.names.iter().any(|name| name == file) {
            let like: Vec<_> = snapshot.names.iter().take(5).map(String::as_str).collect();
            let message = format!("the dataset has no such file; it has {}", like.join(", "));
            return Err(Error::file(format!("{DATASETS}{rest}"), message));
        }
        self.fetch(&repository, &snapshot, &[file])?;
        self.note(&repository, &snapshot)?;
        Ok(snapshot.path.join(file))
    }

    /// Looks up the newest commit of a repository. Offline or without a network, uses the cached snapshot if
    /// it is `complete`.
    ///
    /// # Errors
    /// There is no such repository, or the hub denies access; there is neither a network nor a complete
    /// snapshot in the cache.
    pub(crate) fn snapshot(
        &self,
        repository: &Repository,
        complete: impl Fn(&Path) -> bool,
    ) -> Result<Lookup> {
        self.first(std::slice::from_ref(repository), complete).map(|(_, found)| found)
    }

    /// Looks up the first of these repositories that exists, as [`Self::snapshot`].
    ///
    /// # Errors
    /// As [`Self::snapshot`]; the error names the first repository.
    pub(crate) fn first<'a>(
        &self,
        repositories: &'a [Repository],
        complete: impl Fn(&Path) -> bool,
    ) -> Result<(&'a Repository, Lookup)> {
        let [named, others @ ..] = repositories else {
            return Err(Error::Bug("no repository to look up".to_owned()));
        };
        let id = &named.id;
        let cached = || {
            repositories.iter().find_map(|repository| {
                let home = self.home(repository);
                let commit = std::fs::read_to_string(home.join("refs").join(&repository.revision)).ok()?;
                let path = home.join("snapshots").join(commit.trim());
                complete(&path).then_some((repository, path))
            })
        };
        if self.offline {
            let found = cached().map(|(repository, path)| (repository, Lookup::Cached(path)));
            return found.ok_or_else(|| {
                let message = format!(
                    "no such folder, and no complete copy in the cache {}; HF_HUB_OFFLINE is set\n\
                     hint: give the path \
                     of a folder, or run once without HF_HUB_OFFLINE",
                    self.home(named).display()
                );
                Error::file(id, message)
            });
        }
        let url = |repository: &Repository| format!("{}{}", self.endpoint, repository.info_path());
        let (mut repository, mut answer) = (named, self.get(&url(named), None));
        for other in others {
            // Without a token, the hub answers 401 for a repository that does not exist.
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
                        tracing::warn!(
                            "{}: {error}; using the cached copy {}",
                            self.endpoint,
                            path.display()
                        );
                        Ok((repository, Lookup::Cached(path)))
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
        Ok((repository, Lookup::Listed(listed)))
    }

    /// Fetches the files `names` that the snapshot lacks. A lock makes the other ranks of a node wait for the
    /// one that fetches.
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

    /// Writes the commit of the revision into the cache. Later runs without a network use this snapshot.
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

/// Result of looking up a repository.
pub(crate) enum Lookup {
    /// A complete snapshot in the cache; the hub was not reached.
    Cached(PathBuf),
    /// The newest snapshot on the hub.
    Listed(Snapshot),
}

/// Makes an HTTP client whose requests fail when the server sends nothing for `stall`.
fn agent(stall: Duration) -> ureq::Agent {
    ureq::Agent::config_builder()
        .user_agent(concat!("lodestone/", env!("CARGO_PKG_VERSION")))
        // The hub redirects to itself, with the token, and then to its storage, which must not get it.
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
    fn files_of_datasets_are_cached_and_used_offline() {
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
            error.contains("the dataset has no such file; it has README.md, data/train.jsonl"),
            "{error}"
        );
    }

    #[test]
    fn a_stalled_download_resumes_where_it_stopped() {
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
    fn names_of_files_are_percent_encoded_in_urls() {
        let name = "data/a#1 b.jsonl";
        let server = Server::start(&[
            ("/api/datasets/org/set/revision/v%231", listing(&[name])),
            ("/datasets/org/set/resolve/abc123/data/a%231%20b.jsonl", body("{}\n")),
        ]);
        let home = tempfile::tempdir().unwrap();
        let file = hub(&server.endpoint, home.path(), &[]).data_file("org/set@v#1/data/a#1 b.jsonl").unwrap();
        assert!(file.ends_with(name), "{}", file.display());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "{}\n");
        assert_eq!(percent_encode("a/é?%-._~"), "a/%C3%A9%3F%25-._~");
    }

    #[test]
    fn malformed_paths_are_refused() {
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
