-- Claim the entries whose turn it is. All that were never delivered are first put among those that wait: pending for a
-- consumer of no replica, so that the stream's length, its pending entries and whoever looks for lost ones know of them.
-- KEYS: stream
-- ARGV: consumer group, consumer, most entries to claim, entries of a page, consumer that stands for those that wait,
-- prefix of records, (k, request id)... of entries that the consumer has just read itself
-- Returns {1 if more pages follow, in which case nothing is claimed, {entry id, fields}...}.
-- requires: turns
local WAITING = ARGV[5]

local function ensure(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then redis.call('UNLINK', key) end
end

local function list_of(queue)
  return KEYS[1] .. ':turn:' .. queue
end

-- Note that a queue is served at this counter.
local function note_served(place, counter)
  write_number('served:' .. place.class, math.max(counter, counter_number('served:' .. place.class)))
end

local function enqueue(id, fields)
  local k, r = field_of(fields, 'k'), field_of(fields, 'r')
  local place = place_of(k)
  ensure(list_of(place.queue), 'list')
  redis.call('RPUSH', list_of(place.queue), id .. '\n' .. k .. '\n' .. r)
  redis.call('ZADD', TURNS .. ':' .. place.class, 'NX', first_counter(place), place.queue)
  redis.call('EXPIRE', list_of(place.queue), KEPT_S)
  redis.call('EXPIRE', TURNS .. ':' .. place.class, KEPT_S)
end

-- Claim an entry that waits; nil if it does not any more.
local function claim(id)
  if #redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, WAITING) == 0 then return end
  return redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'RETRYCOUNT', 1)[1]
end

-- Take the first of the queue that is next in a class; false if nobody waits in it.
local function take_next(class, taken)
  local turns = TURNS .. ':' .. class
  local queue, counter = unpack(redis.call('ZRANGE', turns, 0, 0, 'WITHSCORES'))
  if not queue then return false end
  local list = list_of(queue)
  ensure(list, 'list')
  local id, k, r = string.match(redis.call('LPOP', list) or '', '^([^\n]*)\n([^\n]*)\n(.*)$')
  local entry = id and claim(id)
  if entry then
    local place = place_of(k)
    note_served(place, tonumber(counter))
    charge(place, k, ARGV[6] .. r)
    taken[#taken + 1] = entry
  end
  if redis.call('EXISTS', list) == 0 then
    write_number('counter:' .. queue, tonumber(redis.call('ZSCORE', turns, queue)))
    redis.call('ZREM', turns, queue)
  end
  return true
end

ensure(TURNS, 'hash')
for class = 0, 3 do ensure(TURNS .. ':' .. class, 'zset') end
for i = 7, #ARGV, 2 do
  local place = place_of(ARGV[i])
  note_served(place, first_counter(place))
  write_number('counter:' .. place.queue, first_counter(place))
  charge(place, ARGV[i], ARGV[6] .. ARGV[i + 1])
end
local most, taken = tonumber(ARGV[3]), {}
if most > 0 then
  local read = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], WAITING, 'COUNT', ARGV[4], 'STREAMS', KEYS[1], '>')
  if read and read.err then return redis.error_reply(read.err) end
  local page = read and read[1][2] or {}
  for _, entry in ipairs(page) do enqueue(entry[1], entry[2]) end
  if #page == tonumber(ARGV[4]) then return {1, {}} end
  for class = 0, 3 do
    while #taken < most and take_next(class, taken) do end
  end
  if #taken < most then -- of which somebody has deleted the place in the order
    for _, entry in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', most - #taken, WAITING)) do
      taken[#taken + 1] = claim(entry[1])
    end
  end
end
redis.call('EXPIRE', TURNS, KEPT_S)
return {0, taken}
