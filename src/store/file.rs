//! File: the tables of the state file, and how they are read and written.
//!
//! One redb database. `meta` has the format and the secrets, `services` the rollout and the drains of each service; and each
//! has three tables of its own: `places:NAME` (endpoints by number), `pins:NAME` and `runs:NAME`.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
    TableError, TableHandle, WriteTransaction,
};
use serde::{Deserialize, Serialize};

use crate::ids;
use crate::rollout::Rollout;
use crate::state::changes::Delta;
use crate::state::image::{DrainImage, Pin, Place, RunImage, ServiceImage};
use crate::store::{Kept, OpenError};

/// What this program writes; it reads no newer one.
const FORMAT: u64 = 1;

const NAME: &str = "longhaul.redb";

/// Pages that redb keeps in memory. They are read once, at the start.
const CACHE_BYTES: usize = 32 << 20;

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const SERVICES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("services");

/// What keys the digests and the cookies of this state: pins of one secret are nobody's under another.
#[derive(Clone, Serialize, Deserialize)]
pub struct Secrets {
    /// Keys the digests of `session.scope` values.
    pub scope: [u8; 16],
    /// Behind the cookies of services that name no secret.
    pub cookie: [u8; 32],
}

impl Secrets {
    pub fn generate() -> Secrets {
        Secrets { scope: ids::random_bytes(), cookie: ids::random_bytes() }
    }
}

/// What a service has once.
#[derive(Default, Serialize, Deserialize)]
struct ServiceRow {
    rollout: Option<Rollout>,
    drains: Vec<DrainImage>,
}

/// The open file.
pub(super) struct StateFile {
    database: Database,
    path: PathBuf,
    /// The numbers of places, by service.
    places: HashMap<String, HashMap<Place, u32>>,
}

/// The file in a directory.
pub fn path_in(directory: &Path) -> PathBuf {
    directory.join(NAME)
}

fn pins(service: &str) -> String {
    format!("pins:{service}")
}

fn runs(service: &str) -> String {
    format!("runs:{service}")
}

fn places(service: &str) -> String {
    format!("places:{service}")
}

impl StateFile {
    /// Opens it, and makes it where it is not there.
    pub fn open(directory: &Path, path: &Path) -> Result<StateFile, OpenError> {
        make_private(directory, path)
            .map_err(|failure| OpenError::Unusable { path: path.to_owned(), failure: failure.to_string() })?;
        let database = guarded(path, || {
            Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(|failure| refused(path, failure))
        })?;
        let mut file = StateFile { database, path: path.to_owned(), places: HashMap::new() };
        guarded(path, || file.prepare())?;
        Ok(file)
    }

    /// Sees to it that the file is ours, and learns the numbers of places.
    fn prepare(&mut self) -> Result<(), OpenError> {
        let damaged = |failure: &dyn std::fmt::Display| damaged(&self.path, failure);
        let reading = self.database.begin_read().map_err(|failure| damaged(&failure))?;
        let format = match reading.open_table(META) {
            Ok(meta) => {
                let format = meta.get("format").map_err(|failure| damaged(&failure))?;
                let format = format.and_then(|bytes| serde_json::from_slice::<u64>(bytes.value()).ok());
                Some(format.ok_or_else(|| damaged(&"it has no format"))?)
            }
            Err(TableError::TableDoesNotExist(_)) => {
                if reading.list_tables().map_err(|failure| damaged(&failure))?.next().is_some() {
                    return Err(damaged(&"its tables are another program's"));
                }
                None
            }
            Err(failure) => return Err(damaged(&failure)),
        };
        match format {
            Some(format) if format > FORMAT => Err(OpenError::Newer { path: self.path.clone(), format }),
            Some(_) => {
                self.places = read_places(&reading).map_err(|failure| damaged(&failure))?;
                Ok(())
            }
            None => self.begin().map_err(|failure| OpenError::Unusable { path: self.path.clone(), failure }),
        }
    }

    fn begin(&self) -> Result<(), String> {
        let writing = begin_write(&self.database)?;
        {
            let mut meta = writing.open_table(META).map_err(text)?;
            meta.insert("format", json(&FORMAT)?.as_slice()).map_err(text)?;
            meta.insert("secrets", json(&Secrets::generate())?.as_slice()).map_err(text)?;
            writing.open_table(SERVICES).map_err(text)?;
        }
        writing.commit().map_err(text)
    }

    /// What is written from here on is under these.
    pub fn keep_secrets(&self, secrets: &Secrets) -> Result<(), String> {
        let writing = begin_write(&self.database)?;
        writing.open_table(META).map_err(text)?.insert("secrets", json(secrets)?.as_slice()).map_err(text)?;
        writing.commit().map_err(text)
    }

    /// All that is kept.
    pub fn read(&self) -> Result<Kept, OpenError> {
        guarded(&self.path, || self.read_all().map_err(|failure| damaged(&self.path, &failure)))
    }

    fn read_all(&self) -> Result<Kept, String> {
        let reading = self.database.begin_read().map_err(text)?;
        let meta = reading.open_table(META).map_err(text)?;
        let secrets = meta.get("secrets").map_err(text)?.ok_or("it has no secrets")?;
        let secrets = serde_json::from_slice(secrets.value()).map_err(text)?;
        let mut services = HashMap::new();
        let rows = reading.open_table(SERVICES).map_err(text)?;
        for row in rows.iter().map_err(text)? {
            let (name, row) = row.map_err(text)?;
            let (name, row): (&str, ServiceRow) = (name.value(), serde_json::from_slice(row.value()).map_err(text)?);
            let image = read_service(&reading, name, row, self.places.get(name))?;
            services.insert(name.to_owned(), image);
        }
        Ok(Kept { secrets, services })
    }

    /// Writes what has changed in one transaction, which is on the disk when this returns. `None`: a service is no more.
    pub fn write(&mut self, changed: &[(Arc<str>, Option<Delta>)]) -> Result<(), String> {
        let writing = begin_write(&self.database)?;
        for (service, delta) in changed {
            match delta {
                Some(delta) => {
                    let known = self.places.entry(service.to_string()).or_default();
                    write_service(&writing, service, delta, known)?;
                }
                None => {
                    self.places.remove(&**service);
                    for table in [pins(service), runs(service), places(service)] {
                        writing.delete_table(BytesDefinition::new(&table)).map_err(text)?;
                    }
                    writing.open_table(SERVICES).map_err(text)?.remove(&**service).map_err(text)?;
                }
            }
        }
        writing.commit().map_err(text)
    }

    pub fn close(self) -> Result<(), String> {
        self.database.close().map_err(text)
    }
}

fn write_service(
    writing: &WriteTransaction,
    service: &str,
    delta: &Delta,
    known: &mut HashMap<Place, u32>,
) -> Result<(), String> {
    let (pins, runs, places) = (pins(service), runs(service), places(service));
    let [pins, runs, places] = [&pins, &runs, &places].map(|name| BytesDefinition::new(name));
    if delta.whole {
        for table in [pins, runs, places] {
            writing.delete_table(table).map_err(text)?;
        }
        known.clear();
    }
    let mut numbers = Vec::with_capacity(delta.places.len());
    {
        let mut table = writing.open_table(places).map_err(text)?;
        for place in &delta.places {
            let number = match known.get(place) {
                Some(number) => *number,
                None => {
                    let number = known.values().max().map_or(0, |newest| newest + 1);
                    table.insert(number.to_be_bytes().as_slice(), json(place)?.as_slice()).map_err(text)?;
                    known.insert(place.clone(), number);
                    number
                }
            };
            numbers.push(number);
        }
    }
    let number = |place: u32| numbers.get(place as usize).copied().ok_or("a pin is at no place");
    {
        let mut table = writing.open_table(pins).map_err(text)?;
        for key in &delta.removed {
            table.remove(&**key).map_err(text)?;
        }
        let mut value = Vec::new();
        for pin in &delta.pins {
            value.clear();
            pin.write_value_at(number(pin.place)?, &mut value);
            table.insert(&*pin.key.to_bytes(), value.as_slice()).map_err(text)?;
        }
    }
    {
        let mut table = writing.open_table(runs).map_err(text)?;
        for id in &delta.ended {
            table.remove(id.as_bytes()).map_err(text)?;
        }
        for run in &delta.runs {
            let kept = RunImage { place: number(run.place)?, ..run.clone() };
            table.insert(run.id.as_bytes(), json(&kept)?.as_slice()).map_err(text)?;
        }
    }
    let mut table = writing.open_table(SERVICES).map_err(text)?;
    let row = table.get(service).map_err(text)?.map(|row| serde_json::from_slice::<ServiceRow>(row.value()));
    let is_new = row.is_none();
    let mut row = row.and_then(Result::ok).unwrap_or_default();
    if let Some(drains) = &delta.drains {
        row.drains.clone_from(drains);
    }
    if let Some(rollout) = &delta.rollout {
        row.rollout.clone_from(rollout);
    }
    if is_new || delta.drains.is_some() || delta.rollout.is_some() {
        table.insert(service, json(&row)?.as_slice()).map_err(text)?;
    }
    Ok(())
}

fn read_service(
    reading: &ReadTransaction,
    name: &str,
    row: ServiceRow,
    places: Option<&HashMap<Place, u32>>,
) -> Result<ServiceImage, String> {
    let ServiceRow { rollout, drains } = row;
    let mut image = ServiceImage { name: name.to_owned(), rollout, drains, ..ServiceImage::default() };
    // Numbers of places that nothing refers to any more may be missing.
    let mut indices = HashMap::new();
    for (place, number) in places.into_iter().flatten() {
        indices.insert(*number, image.places.len() as u32);
        image.places.push(place.clone());
    }
    let index = |number: u32| indices.get(&number).copied().ok_or("a pin or run is at no place");
    if let Some(table) = table(reading, &pins(name))? {
        for entry in table.iter().map_err(text)? {
            let (key, value) = entry.map_err(text)?;
            let mut pin = Pin::read(key.value(), value.value()).ok_or("a pin is none")?;
            pin.place = index(pin.place)?;
            image.pins.push(pin);
        }
    }
    if let Some(table) = table(reading, &runs(name))? {
        for entry in table.iter().map_err(text)? {
            let (_, value) = entry.map_err(text)?;
            let mut run: RunImage = serde_json::from_slice(value.value()).map_err(text)?;
            run.place = index(run.place)?;
            image.runs.push(run);
        }
    }
    Ok(image)
}

fn read_places(reading: &ReadTransaction) -> Result<HashMap<String, HashMap<Place, u32>>, String> {
    let mut all = HashMap::new();
    let names: Vec<String> = reading.list_tables().map_err(text)?.map(|table| table.name().to_owned()).collect();
    for name in names {
        let Some(service) = name.strip_prefix("places:") else { continue };
        let mut places = HashMap::new();
        if let Some(table) = table(reading, &name)? {
            for entry in table.iter().map_err(text)? {
                let (number, place) = entry.map_err(text)?;
                let number = number.value().try_into().map(u32::from_be_bytes).map_err(text)?;
                places.insert(serde_json::from_slice(place.value()).map_err(text)?, number);
            }
        }
        all.insert(service.to_owned(), places);
    }
    Ok(all)
}

type BytesDefinition<'n> = TableDefinition<'n, &'static [u8], &'static [u8]>;
type BytesTable = redb::ReadOnlyTable<&'static [u8], &'static [u8]>;

/// `None`: there is no such table.
fn table(reading: &ReadTransaction, name: &str) -> Result<Option<BytesTable>, String> {
    match reading.open_table(BytesDefinition::new(name)) {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(failure) => Err(text(failure)),
    }
}

fn begin_write(database: &Database) -> Result<WriteTransaction, String> {
    let mut writing = database.begin_write().map_err(text)?;
    // So that the start after a crash needs not read the whole file to find what is free in it.
    writing.set_quick_repair(true);
    Ok(writing)
}

/// The directory, for its owner alone: session keys are in the file, and what keys their digests.
fn make_private(directory: &Path, path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    Ok(())
}

fn refused(path: &Path, failure: DatabaseError) -> OpenError {
    match failure {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => OpenError::Locked(path.to_owned()),
        DatabaseError::Storage(StorageError::Io(failure)) if failure.kind() != std::io::ErrorKind::InvalidData => {
            OpenError::Unusable { path: path.to_owned(), failure: failure.to_string() }
        }
        failure => damaged(path, &failure),
    }
}

fn damaged(path: &Path, failure: &dyn std::fmt::Display) -> OpenError {
    OpenError::Damaged { path: path.to_owned(), failure: failure.to_string() }
}

/// redb trusts what it wrote, and may panic where somebody else wrote into it.
fn guarded<T>(path: &Path, act: impl FnOnce() -> Result<T, OpenError>) -> Result<T, OpenError> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_| Err(damaged(path, &"its pages contradict each other")))
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, String> {
    serde_json::to_vec(value).map_err(text)
}

fn text(failure: impl std::fmt::Display) -> String {
    failure.to_string()
}
