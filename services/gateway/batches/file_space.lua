-- Prelude of the scripts that write files: chunks of about 1 MB, a budget of bytes for all files and for those of an
-- owner, and expiry. Every file, also one that is being written, is in the index by its expiry; whoever writes next
-- deletes what is over.
-- KEYS: index of files by expiry, hash of sizes: of each file, of each owner's files (of:OWNER), and of all (all)
-- ARGV: prefix of files
-- requires: sizes
local FILES, SIZES, FILE = KEYS[1], KEYS[2], ARGV[1]
local CHUNK, OWN_BYTES, SWEPT = 1048576, 1024, 64 -- OWN_BYTES: what a file takes beside its content
local MOST_CHUNKS = 2 ^ 16 -- of a file: 64 GiB. A number that is damaged must not occupy Redis for ever.

local function size_of(field)
  return read_size(SIZES, field)
end

local function count_bytes(id, owner, bytes)
  for _, field in ipairs({id, 'of:' .. owner, 'all'}) do add_size(SIZES, field, bytes) end
end

local function remove_file(id)
  local key = FILE .. id
  local owner = redis.call('HGET', key, 'owner') or ''
  for n = 0, math.min(tonumber(redis.call('HGET', key, 'chunks') or 0) or 0, MOST_CHUNKS) - 1 do
    redis.call('UNLINK', key .. ':' .. n)
  end
  count_bytes(id, owner, -size_of(id))
  redis.call('HDEL', SIZES, id)
  if size_of('of:' .. owner) == 0 then redis.call('HDEL', SIZES, 'of:' .. owner) end
  redis.call('ZREM', FILES, id)
  redis.call('ZREM', FILES .. ':of:' .. owner, id)
  redis.call('UNLINK', key)
end

local function sweep_files()
  local now = redis.call('TIME')[1]
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', FILES, '-inf', now, 'LIMIT', 0, SWEPT)) do
    remove_file(id)
  end
end

-- Return the bytes that are taken, of all or of the owner's share, if so many more do not fit; else nil.
local function taken_if_full(owner, bytes, budget, share)
  if size_of('all') + bytes > budget then return size_of('all') end
  if size_of('of:' .. owner) + bytes > share then return size_of('of:' .. owner) end
end

local function append_piece(key, piece)
  local last = tonumber(redis.call('HGET', key, 'chunks') or 0) - 1
  if last < 0 or redis.call('STRLEN', key .. ':' .. last) + #piece > CHUNK then
    last = redis.call('HINCRBY', key, 'chunks', 1) - 1
  end
  redis.call('APPEND', key .. ':' .. last, piece)
end

-- Append to a file, which begins with its first piece. Returns what is taken if there is no room; else nil.
local function append_file(id, owner, expiry, budget, share, pieces)
  sweep_files()
  local key, bytes = FILE .. id, 0
  for _, piece in ipairs(pieces) do bytes = bytes + #piece end
  local is_new = redis.call('EXISTS', key) == 0
  local charged = bytes + (is_new and OWN_BYTES or 0)
  local taken = taken_if_full(owner, charged, budget, share)
  if taken then return taken end
  if is_new then
    redis.call('HSET', key, 'owner', owner, 'size', 0, 'chunks', 0)
    redis.call('ZADD', FILES, expiry, id)
  end
  count_bytes(id, owner, charged)
  redis.call('HINCRBY', key, 'size', bytes)
  for _, piece in ipairs(pieces) do append_piece(key, piece) end
end
