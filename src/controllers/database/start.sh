# No other server has the volume. A pod that is deleted by force may have a successor while its server still runs, and
# PostgreSQL's own lock file, which names a process, is no help: each pod counts its processes by itself. The server and
# its children inherit the lock and keep it until the last of them has ended. It holds where locks hold: on one node, or on
# a file system that shares them; between nodes it is the attachment of the volume that keeps two servers apart.
exec 9>>"$0/weft.lock" || exit
flock -n 9 || { echo "another server still uses this volume: waiting until it has ended" >&2; flock 9; }

# The database is whole. The entry point takes one whose making was cut off for a finished one; the mark, durable before
# anybody can have written, records that it is not.
unfinished=$0/weft.unfinished
known=$0/weft.admin
now=$(sha256sum <"$POSTGRES_PASSWORD_FILE") || exit
if [ -e "$unfinished" ]; then rm -rf "$PGDATA" || exit; fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  [ -n "$(ls -A "$PGDATA" 2>/dev/null)" ] || : >"$unfinished" || exit
  docker-ensure-initdb.sh "$@" || exit
  (umask 077 && printf '%s\n' "$now" >"$known") && rm -f "$unfinished" && sync || exit
fi

# The superuser's password is that of the Secret, which may have been made again since. Nothing of it is in an argument
# or in the log.
if [ "$now" != "$(cat "$known" 2>/dev/null)" ]; then
  quoted=$(sed "s/'/''/g" "$POSTGRES_PASSWORD_FILE") || exit
  printf "alter role postgres password '%s'\n" "$quoted" | (
    shift
    exec postgres --single -D "$PGDATA" "$@" -c exit_on_error=on -c log_statement=none \
      -c log_min_duration_statement=-1 -c log_min_error_statement=panic postgres
  ) >/dev/null || exit
  (umask 077 && printf '%s\n' "$now" >"$known") && sync || exit
fi
exec docker-entrypoint.sh "$@"
