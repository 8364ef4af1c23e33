-- Prelude of the scripts that keep the order of service among tenants: weighted fair queueing by a counter of virtual
-- tokens. Whose counter is lowest is next, in the highest class in which anybody waits; what a request costs, over the
-- weight of its tenant, is added. Who has been idle begins at the counter of the last one served, so nobody saves up.
--
-- The field k of an entry is its place: "class weight tokens most name": class 0 (high) to 3 (of batches), tokens of the
-- prompt, and the most of the answer. An answer costs twice as much a token; until it has ended, the mean of its tenant counts.
--
-- KEYS: work stream, ...
-- Keys beside the stream, which expire, and for which nothing is lost when they are gone:
--   STREAM:turns            hash: counter:QUEUE and mean:QUEUE of each tenant, served:CLASS: counter of the last served
--   STREAM:turns:CLASS      zset: queues in which somebody waits, by counter
--   STREAM:turn:QUEUE       list: "entry id, k, request id", first come first served; QUEUE is "CLASS name"
local ANSWER, FIRST_MEAN, UNKNOWN_COST, KEPT_S = 2, 256, 1024, 86400
local TURNS = KEYS[1] .. ':turns'

local function place_of(k)
  local class, weight, tokens, most, name = string.match(k or '', '^([0123]) ([%d.e+-]+) (%d+) (%d+) ([%w._-]*)$')
  weight = tonumber(weight)
  if not weight or weight <= 0 then class, weight, tokens, most, name = '1', 1, UNKNOWN_COST, 0, '' end
  return {
    class = class, weight = weight, tokens = tonumber(tokens), most = tonumber(most), queue = class .. ' ' .. name
  }
end

local function field_of(fields, name)
  for i = 1, #fields, 2 do
    if fields[i] == name then return fields[i + 1] end
  end
  return ''
end

local function counter_number(field)
  return tonumber(redis.call('HGET', TURNS, field) or 0) or 0
end

local function write_number(field, value)
  redis.call('HSET', TURNS, field, string.format('%.3f', value))
end

local function add_cost(place, cost)
  local turns = TURNS .. ':' .. place.class
  if redis.call('ZSCORE', turns, place.queue) then
    redis.call('ZINCRBY', turns, cost / place.weight, place.queue)
  else
    write_number('counter:' .. place.queue, counter_number('counter:' .. place.queue) + cost / place.weight)
  end
end

local function first_counter(place)
  return math.max(counter_number('counter:' .. place.queue), counter_number('served:' .. place.class))
end

-- Charge a request that begins; its record keeps what was charged, for `settle`.
local function charge(place, k, record)
  local expected = math.min(place.most, tonumber(redis.call('HGET', TURNS, 'mean:' .. place.queue)) or FIRST_MEAN)
  add_cost(place, place.tokens + ANSWER * expected)
  if place.most > 0 and redis.call('TYPE', record).ok == 'hash' then
    redis.call('HSET', record, 'charged', string.format('%d %s', expected, k))
  end
end

-- Correct what a request was charged, once: its answer had so many tokens; none (nil), and it never began.
local function settle(record, generated)
  local charged = redis.call('TYPE', record).ok == 'hash' and redis.call('HGET', record, 'charged')
  if not charged then return end
  redis.call('HDEL', record, 'charged')
  local expected, k = string.match(charged, '^(%d+) (.*)$')
  if not expected or redis.call('TYPE', TURNS).ok ~= 'hash' then return end
  local place = place_of(k)
  if not generated then
    add_cost(place, -place.tokens - ANSWER * expected)
    return
  end
  add_cost(place, ANSWER * (generated - expected))
  local mean = tonumber(redis.call('HGET', TURNS, 'mean:' .. place.queue)) or FIRST_MEAN
  write_number('mean:' .. place.queue, mean + (generated - mean) / 8)
end
