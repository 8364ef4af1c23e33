-- Claim batches that nobody works on, oldest first. A lease that its holder does not renew expires.
-- While several owners have batches here, an owner below its part of the places goes first, and the newest batches of
-- those above theirs make room for it: else one owner, at its rate limit, would hold every place for days.
-- KEYS: batches that have not ended
-- ARGV: prefix of batches, gateway, ms of a lease, places of the gateway, batches that the gateway works on...
-- Returns {those that it has claimed, those that the gateway must give up for them}.
local held, running, waiting, places_of, owners = {}, {}, {}, {}, 0
for i = 5, #ARGV do held[ARGV[i]] = true end
local free = tonumber(ARGV[4]) - (#ARGV - 4)

local function note(id, list)
  local owner = redis.call('HGET', ARGV[1] .. id, 'owner') or ''
  if not places_of[owner] then
    places_of[owner], owners = 0, owners + 1
  end
  list[#list + 1] = {id = id, owner = owner}
end

for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local lease = redis.call('GET', ARGV[1] .. id .. ':lease')
  if redis.call('EXISTS', ARGV[1] .. id) == 0 then
    redis.call('ZREM', KEYS[1], id)
  elseif held[id] then
    note(id, running)
    places_of[running[#running].owner] = places_of[running[#running].owner] + 1
  elseif not lease or lease == ARGV[2] then
    note(id, waiting)
  end
end

local part = math.max(1, math.floor(ARGV[4] / math.max(1, owners)))
local claimed, given_up = {}, {}

local function make_room()
  for i = #running, 1, -1 do
    local each = running[i]
    if places_of[each.owner] > part then
      table.remove(running, i)
      given_up[#given_up + 1] = each.id
      places_of[each.owner], free = places_of[each.owner] - 1, free + 1
      return
    end
  end
end

local function claim(each)
  redis.call('SET', ARGV[1] .. each.id .. ':lease', ARGV[2], 'PX', ARGV[3])
  claimed[#claimed + 1] = each.id
  places_of[each.owner], free, each.claimed = places_of[each.owner] + 1, free - 1, true
end

for _, each in ipairs(waiting) do
  if places_of[each.owner] < part then
    if free <= 0 then make_room() end
    if free > 0 then claim(each) end
  end
end
for _, each in ipairs(waiting) do
  if free > 0 and not each.claimed then claim(each) end
end
return {claimed, given_up}
